"""`fkdpipe import` and `fkdpipe export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fkdpipe.commands import options, terminal


@click.command("import")
@click.argument("format")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("store")
@click.option(
    "--classes",
    type=int,
    metavar="C",
    help="Number of classes of the teacher.  [default: number of class folders]",
)
@click.option(
    "--temperature", type=float, help="Temperature of the teacher's softmax, to be recorded."
)
@click.option(
    "--teacher-name",
    "teacher",
    help="Name of the teacher, to be recorded; also the default name of the labels.",
)
@click.option(
    "--crops", type=int, metavar="M", help="Number of crops per image.  [default: all of the files]"
)
@click.option("--source-name", help="Name of the labels in the store.")
@click.option(
    "--seed", type=int, help="Seed for the image order, and for crops drawn for label maps."
)
@click.option(
    "--keep", type=int, metavar="K", help="Label maps: number of classes to keep.  [default: 5]"
)
@click.option(
    "--compat-transposed",
    is_flag=True,
    help="Label maps: swap x and y when pooling, as the published code does.",
)
@click.option(
    "--skip-transformed",
    is_flag=True,
    help="ml-dr: skip crops with transforms other than crop and flip.",
)
@click.option(
    "--assume-plain", is_flag=True, help="tinyvit: assume that only crop and flip were used."
)
@click.option("--sampler-seed", type=int, help="sre2l: value of --fkd-seed.  [default: 42]")
@click.option("--threads", type=int, help="Number of threads reading files.  [default: 4]")
@options.json_option
def import_(
    format: str,
    source: Path,
    data: Path,
    store: str,
    source_name: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Convert label files of another system into STORE.

    SOURCE holds the label files, DATA the images. FORMAT is fkd, ml-dr, tinyvit, relabel,
    tokenlabeling or sre2l. Code in the files is never executed. Images without usable labels are
    listed and left out. Run the same command again to resume.

    \b
    Example:
      fkdpipe import fkd soft_labels images store --temperature 1 --teacher-name efficientnet_l2
    """
    from fkdpipe import interchange
    from fkdpipe.common import words
    from fkdpipe.interchange import importing
    from fkdpipe.interchange.source import ImportSettings
    from fkdpipe.storage.location import open_location

    interchange.choose(interchange.IMPORTS, format)  # before anything is scanned
    values = {key: v for key, v in flags.items() if v is not None and v is not False}
    interchange.check_settings(format, values)
    settings = ImportSettings(source=source_name or "", **values)
    reporter = terminal.reporter()
    folder = importing.scan(data, reporter)
    labels = interchange.open_labels(format, source, folder, settings)
    result = importing.import_labels(
        labels, folder, open_location(store), settings, reporter=reporter
    )
    if as_json:
        terminal.print_json(
            {
                "images": result.store.num_images,
                "crops_per_image": result.crops,
                "form": result.form,
                "units_made": result.made,
                "units_kept": result.kept,
                "failed": dict(result.failed),
                "failed_examples": result.examples,
                "extra": labels.extra,
                "extra_examples": list(labels.extra_examples),
                "moved_boxes": result.moved,
                "notes": list(result.notes),
            }
        )
        return
    reasons = ", ".join(f"{count} {code}" for code, count in sorted(result.failed.items()))
    left_out = words.count(result.failed.total(), "image")
    click.echo(
        f"{store}: {result.store.num_images:,} images x {result.crops} crops, form {result.form}; "
        f"{words.count(result.made, 'unit')} made, {result.kept} kept, {left_out} left out"
        f"{f' ({reasons})' if reasons else ''}."
    )
    others = [name for name in result.store.sources() if name != result.source]
    more = f"; the store also has {', '.join(others)}" if others else ""
    click.echo(f"The labels are stored as source {result.source}{more}.")


@click.command()
@click.argument("format")
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", help="Labels to export, if the store has several.")
@click.option(
    "--keep", type=int, metavar="K", help="Number of classes to write.  [default: all stored]"
)
@options.json_option
def export(
    format: str, store: str, out: Path, source: str | None, keep: int | None, as_json: bool
) -> None:
    """Export the labels of STORE in the format of another system.

    OUT is the folder to create. FORMAT is fkd, ml-dr, tinyvit or parquet (requires
    fkdpipe[parquet]).

    \b
    Example:
      fkdpipe export fkd store soft_labels --keep 5
    """
    from fkdpipe import interchange
    from fkdpipe.common import words
    from fkdpipe.common.progress import keeping
    from fkdpipe.interchange.exporting import ExportSettings
    from fkdpipe.storage.store import open_store

    write = interchange.choose(interchange.EXPORTS, format)
    reporter = terminal.reporter()
    settings = ExportSettings(source=source, keep=keep)
    opened = open_store(store)
    with keeping(lambda: f"{out} is not complete; delete it before you export again."):
        result = write(opened, out, settings, reporter=reporter)
    if as_json:
        terminal.print_json(
            {"images": result.images, "files": result.files, "notes": list(result.notes)}
        )
        return
    files = words.count(result.files, "file")
    click.echo(f"{out}: labels of {words.count(result.images, 'image')} in {files}.")
    for note in result.notes:
        click.echo(f"note: {note}")
