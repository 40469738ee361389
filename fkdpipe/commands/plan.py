"""`fkdpipe plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fkdpipe.commands import options, terminal

if TYPE_CHECKING:
    from fkdpipe.storage.plan import Plan


@click.command()
@click.option("--images", type=int, default=1_281_167, show_default=True, help="Number of images.")
@click.option(
    "--crops", type=int, default=200, show_default=True, help="Number of crops per image."
)
@click.option("--classes", type=int, default=1000, show_default=True, help="Number of classes.")
@click.option(
    "--form", "forms", multiple=True, help="Label form; repeat to compare.  [default: topk:10]"
)
@click.option(
    "--features",
    multiple=True,
    metavar="D[:int8]",
    help="Dimension of feature vectors to store; repeat for several.",
)
@click.option("--derive-boxes", is_flag=True, help="Derive boxes from the seed, not stored.")
@click.option(
    "--teacher-throughput",
    type=float,
    callback=options.finite,
    metavar="CROPS/S",
    help="Labelling speed of all teachers together.",
)
@click.option(
    "--train-throughput",
    type=float,
    callback=options.finite,
    metavar="CROPS/S",
    help="Training speed of one node.",
)
@click.option("--html", type=click.Path(path_type=Path), help="File for an HTML page with plots.")
@options.json_option
def plan(
    images: int,
    crops: int,
    classes: int,
    forms: tuple[str, ...],
    features: tuple[str, ...],
    derive_boxes: bool,
    teacher_throughput: float | None,
    train_throughput: float | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Estimate the size, time and memory of a future store.

    \b
    Example:
      fkdpipe plan --form topk:10 --form full --teacher-throughput 8000
    """
    from fkdpipe.storage import plan as planning
    from fkdpipe.storage.labels import parse_form

    if html is not None:
        terminal.check_file(html, (".html",))
    texts = forms or (() if features else ("topk:10",))
    result = planning.plan(
        planning.Wanted(
            images=images,
            crops=crops,
            classes=classes,
            forms=tuple(parse_form(text) for text in texts),
            features=tuple(planning.parse_features(text) for text in features),
            teacher_throughput=teacher_throughput,
            train_throughput=train_throughput,
            derived_boxes=derive_boxes,
        )
    )
    if html is not None:
        from fkdpipe.inspect import footprint

        terminal.write_file(html, footprint.plan_page(result).encode())
    if as_json:
        terminal.print_json({"plan": result.to_json()})
    else:
        _print_plan(result)


def _print_plan(result: Plan) -> None:
    from fkdpipe.inspect import footprint

    w = result.wanted
    click.echo(f"{w.images:,} images x {w.crops} crops, {w.classes:,} classes")
    terminal.print_table("", *footprint.plan_table(result))
    terminal.print_table("", *footprint.plan_fields(result))
    click.echo("stored: on disk. cache: local disk of each training node, mapped into memory.")
    click.echo("read MB/s: from the store during training, for arrays too wide to cache.")
    click.echo(footprint.PLAN_WORDS)
