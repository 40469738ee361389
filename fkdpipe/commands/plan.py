"""`fkdpipe plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fkdpipe.commands import options, terminal

if TYPE_CHECKING:
    from fkdpipe.storage.plan import Plan


@click.command()
@click.option("--images", type=int, default=1_281_167, show_default=True, help="Of the set.")
@click.option("--crops", type=int, default=200, show_default=True, help="Of each image.")
@click.option("--classes", type=int, default=1000, show_default=True, help="Of the labels.")
@click.option(
    "--form", "forms", multiple=True, help="Of the labels; repeat to compare.  [default: topk:10]"
)
@click.option(
    "--features", multiple=True, metavar="D[:int8]", help="Vectors kept beside the labels; repeat."
)
@click.option("--derive-boxes", is_flag=True, help="Without boxes: the seed gives them.")
@click.option(
    "--teacher-throughput",
    type=float,
    callback=options.finite,
    metavar="CROPS/S",
    help="Labelled by all teachers together.",
)
@click.option(
    "--train-throughput",
    type=float,
    callback=options.finite,
    metavar="CROPS/S",
    help="Consumed by one node's training.",
)
@click.option("--html", type=click.Path(path_type=Path), help="Also a page with plots.")
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
    """Size, time and memory of a store that is not made yet.

    \b
    Example:
      fkdpipe plan --form topk:10 --form full --teacher-throughput 8000
    """
    from fkdpipe.storage import plan as planning
    from fkdpipe.storage.labels import parse_form

    if html is not None:
        terminal.check_file(html, (".html",))
    texts = forms or (() if features else ("topk:10",))
    made = planning.plan(
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

        terminal.write_file(html, footprint.plan_page(made).encode())
    if as_json:
        terminal.print_json({"plan": made.to_json()})
    else:
        _print_plan(made)


def _print_plan(made: Plan) -> None:
    from fkdpipe.inspect import footprint

    w = made.wanted
    click.echo(f"{w.images:,} images x {w.crops} crops, {w.classes:,} classes")
    terminal.print_table("", *footprint.plan_table(made))
    terminal.print_table("", *footprint.plan_fields(made))
    click.echo("stored: on disk. cache: local space on each training node, kept in memory.")
    click.echo("read MB/s: from the store while training, of arrays too wide for the cache.")
    click.echo(footprint.PLAN_WORDS)
