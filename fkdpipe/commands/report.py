"""`fkdpipe report`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fkdpipe.commands import options, terminal

if TYPE_CHECKING:
    from fkdpipe.inspect.report import StorageReport


@click.command()
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option("--html", type=click.Path(path_type=Path), help="File for an HTML page with plots.")
@options.json_option
def report(stores: tuple[str, ...], html: Path | None, as_json: bool) -> None:
    """Show the size of each STORE and the targets it serves.

    Sizes are listed by field and scaled to ImageNet-1K.

    \b
    Example:
      fkdpipe report store
    """
    if html is not None:
        terminal.check_file(html, (".html",))
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
            {"store": url, **each.to_json()} for url, each in zip(stores, measured, strict=True)
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
        click.echo(lines.replace("\0", " "))  # the null kept each target on one line
    left_out = f"{r.rejected} files rejected, {r.failed} images without labels"
    for source in r.sources:
        units = words.count(source.units, "unit")
        click.echo(f"source {source.name}: {source.units_done} of {units}; {left_out}")
    click.echo()
    terminal.print_table("", *footprint.field_table(r))
    click.echo("raw: uncompressed. entropy: an ideal code. Both in bytes per crop.\n")
    if not r.finished:
        click.echo(footprint.unfinished_words([r]))
        return
    click.echo(f"At this size per crop, ImageNet-1K x 200 crops: {words.gigabytes(r.imagenet)}")
    terminal.print_table("", *footprint.paper_rows(r))
    click.echo("planned: a store with that label only (see fkdpipe plan).")
    _echo_classes([r])


def _print_reports(measured: list[StorageReport]) -> None:
    from fkdpipe.inspect import footprint

    terminal.print_table("", *footprint.store_table(measured))
    terminal.print_table("", *footprint.side_by_side(measured))
    click.echo("In parentheses: bytes per crop of an ideal code.\n")
    click.echo("At these sizes per crop, ImageNet-1K x 200 crops:")
    terminal.print_table("", *footprint.paper_side_by_side(measured))
    if text := footprint.unfinished_words(measured):
        click.echo(text)
    _echo_classes(measured)


def _echo_classes(measured: list[StorageReport]) -> None:
    from fkdpipe.inspect import footprint

    if text := footprint.other_classes(measured):
        click.echo(text)
