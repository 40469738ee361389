"""`fkdpipe report`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fkdpipe.commands import options, terminal

if TYPE_CHECKING:
    from fkdpipe.inspect.report import StorageReport
    from fkdpipe.storage.plan import Plan


@click.command()
@click.argument("stores", nargs=-1, metavar="[STORE]...")
@click.option("--plan", "planned", is_flag=True, help="A store that is not made yet.")
@click.option("--images", type=int, default=1_281_167, show_default=True, help="Of the plan.")
@click.option("--crops", type=int, default=200, show_default=True, help="Of each image.")
@click.option("--classes", type=int, default=1000, show_default=True, help="Of the plan.")
@click.option("--form", "forms", multiple=True, help="Planned form; repeat.  [default: topk:10]")
@click.option(
    "--features", multiple=True, metavar="D[:int8]", help="Vectors kept beside the labels; repeat."
)
@click.option("--derive-boxes", is_flag=True, help="Plan without stored boxes.")
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
def report(
    stores: tuple[str, ...],
    planned: bool,
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
    """Bytes of STOREs by field, what they serve, their size at ImageNet scale; or a plan.

    \b
    Example:
      fkdpipe report store
    """
    from fkdpipe.common.errors import UsageError

    context = click.get_current_context()
    of_plan = ("images", "crops", "classes", "forms", "features", "derive_boxes",
               "teacher_throughput", "train_throughput")  # fmt: skip
    given = [
        name
        for name in of_plan
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if planned and stores:
        raise UsageError("--plan is about a store that is not made yet; leave out STORE.")
    if given and not planned:
        raise UsageError(f"--{given[0].replace('_', '-')} belongs to --plan.")
    if html is not None:
        terminal.check_file(html, (".html",))
    if not planned:
        if not stores:
            raise UsageError("name at least one STORE, or give --plan.")
        _report(stores, html, as_json=as_json)
        return
    from fkdpipe.storage.labels import parse_form
    from fkdpipe.storage.plan import Wanted, parse_features, plan

    texts = forms or (() if features else ("topk:10",))
    made = plan(
        Wanted(
            images=images,
            crops=crops,
            classes=classes,
            forms=tuple(parse_form(text) for text in texts),
            features=tuple(parse_features(text) for text in features),
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


def _report(stores: tuple[str, ...], html: Path | None, *, as_json: bool) -> None:
    from fkdpipe.inspect.report import measure
    from fkdpipe.storage.store import open_store

    measured = [measure(open_store(store), bounds=True) for store in stores]
    if html is not None:
        from fkdpipe.inspect import footprint

        terminal.write_file(html, footprint.report_page(measured).encode())
    if as_json and len(measured) == 1:
        terminal.print_json(measured[0].to_json())
    elif as_json:
        rows = [
            {"store": place, **each.to_json()} for place, each in zip(stores, measured, strict=True)
        ]
        terminal.print_json({"stores": rows})
    elif len(measured) == 1:
        _print_report(measured[0])
    else:
        _print_reports(measured)


def _print_report(r: StorageReport) -> None:
    from fkdpipe.common import words
    from fkdpipe.inspect import footprint

    form = f"form {r.form}" if r.form else "no labels"
    click.echo(
        f"{r.url}: {r.images:,} images x {r.crops_per_image} crops, {r.classes:,} classes, {form}"
    )
    if r.targets:
        serves = f"serves {', '.join(r.targets)}".replace(" (", "\0(").replace("any K", "any\0K")
        lines = textwrap.fill(serves, 80, subsequent_indent="  ", break_on_hyphens=False)
        click.echo(lines.replace("\0", " "))  # which kept each target in one piece
    left_out = f"{r.rejected} files rejected, {r.failed} images without labels"
    for source in r.sources:
        units = words.count(source.units, "unit")
        click.echo(f"source {source.name}: {source.units_done} of {units}; {left_out}")
    click.echo()
    terminal.print_table("", *footprint.field_table(r))
    click.echo("raw: uncompressed, entropy: an ideal code; both bytes per crop.\n")
    if not r.finished:
        click.echo(footprint.unfinished_words([r]))
        return
    click.echo(f"At this size per crop, ImageNet-1K x 200 crops: {words.gigabytes(r.imagenet)}")
    terminal.print_table("", *footprint.paper_rows(r))
    click.echo("planned: a store of nothing more than that label (fkdpipe report --plan).")
    _echo_classes([r])


def _print_reports(measured: list[StorageReport]) -> None:
    from fkdpipe.inspect import footprint

    terminal.print_table("", *footprint.store_table(measured))
    terminal.print_table("", *footprint.side_by_side(measured))
    click.echo("In brackets: bytes per crop of an ideal code.\n")
    click.echo("At these sizes per crop, ImageNet-1K x 200 crops:")
    terminal.print_table("", *footprint.paper_side_by_side(measured))
    if words := footprint.unfinished_words(measured):
        click.echo(words)
    _echo_classes(measured)


def _echo_classes(measured: list[StorageReport]) -> None:
    from fkdpipe.inspect import footprint

    if words := footprint.other_classes(measured):
        click.echo(words)


def _print_plan(made: Plan) -> None:
    from fkdpipe.inspect import footprint

    w = made.wanted
    click.echo(f"{w.images:,} images x {w.crops} crops, {w.classes:,} classes")
    terminal.print_table("", *footprint.plan_table(made))
    terminal.print_table("", *footprint.plan_fields(made))
    click.echo("stored: on disk. cache: local space on each training node, kept in memory.")
    click.echo("read MB/s: from the store while training, of arrays too wide for the cache.")
    click.echo(footprint.PLAN_WORDS)
