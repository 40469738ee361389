"""`fkdpipe report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fkdpipe.commands import options, terminal

if TYPE_CHECKING:
    from fkdpipe.storage.report import StorageReport


@click.command()
@click.argument("store")
@options.json_option
def report(store: str, as_json: bool) -> None:
    """Bytes of STORE by field, what it serves, and its size at ImageNet scale.

    \b
    Example:
      fkdpipe report store
    """
    from fkdpipe.storage.report import measure
    from fkdpipe.storage.store import open_store

    measured = measure(open_store(store))
    if as_json:
        terminal.print_json(measured.to_json())
    else:
        _print_report(measured)


def _print_report(r: StorageReport) -> None:
    from fkdpipe.storage.report import to_gigabytes

    rows = [
        [
            name,
            f"{size.stored_bytes:,}",
            f"{size.bytes_per_crop:.3f}",
            f"{size.ratio:.2f}" if size.raw_bytes else "",
        ]
        for name, size in r.fields.items()
    ]
    rows.append(["total", f"{r.stored_bytes:,}", f"{r.bytes_per_crop:.3f}", ""])
    click.echo(
        f"{r.url}: {r.images:,} images x {r.crops_per_image} crops, {r.classes:,} classes, "
        f"form {r.form}"
    )
    click.echo(f"serves {', '.join(r.targets)}")
    left_out = f"{r.rejected} files rejected, {r.failed} images without labels"
    for source in r.sources:
        click.echo(f"source {source.name}: {source.units_done} of {source.units} units; {left_out}")
    click.echo()
    terminal.print_table("", ["field", "No. bytes stored", "bytes per crop", "Storage ratio"], rows)
    click.echo(f"At this size per crop, ImageNet-1K x 200 crops: {to_gigabytes(r.imagenet)}")
    for name, size in r.paper.items():
        click.echo(
            f"  FKD paper, {name}: {to_gigabytes(size)} ({size / r.imagenet:.1f} times this)"
        )
