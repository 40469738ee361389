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
@click.option("--classes", type=int, metavar="C", help="Of the teacher.  [default: class folders]")
@click.option("--temperature", type=float, help="Of the teacher's softmax, for the record.")
@click.option("--teacher-name", "teacher", help="For the record, and to name the labels.")
@click.option("--crops", type=int, metavar="M", help="The first M of each image.  [default: all]")
@click.option("--source-name", help="Name of the labels in the store.")
@click.option("--seed", type=int, help="Of the order of images; of crops drawn for label maps.")
@click.option("--keep", type=int, metavar="K", help="Classes kept of a label map.  [default: 5]")
@click.option("--compat-transposed", is_flag=True, help="Label maps: pool as published, x for y.")
@click.option("--skip-transformed", is_flag=True, help="ml-dr: leave out crops with more changes.")
@click.option("--assume-plain", is_flag=True, help="tinyvit: made with crop and flip alone.")
@click.option("--sampler-seed", type=int, help="sre2l: its --fkd-seed.  [default: 42]")
@click.option("--threads", type=int, help="Readers of label files.  [default: 4]")
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
    """Make STORE from the label files SOURCE of another system, for the images in DATA.

    FORMAT is fkd, ml-dr, tinyvit, relabel, tokenlabeling or sre2l. Nothing in a file is ever run.
    Images without usable labels are listed and left out. Started again, it makes what is missing.

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
    given = {key: v for key, v in flags.items() if v is not None and v is not False}
    interchange.check_settings(format, given)
    settings = ImportSettings(source=source_name or "", **given)
    reporter = terminal.reporter()
    folder = importing.scan(data, reporter)
    labels = interchange.open_labels(format, source, folder, settings)
    made = importing.import_labels(
        labels, folder, open_location(store), settings, reporter=reporter
    )
    if as_json:
        terminal.print_json(
            {
                "images": made.store.num_images,
                "crops_per_image": made.crops,
                "form": made.form,
                "units_made": made.made,
                "units_kept": made.kept,
                "failed": dict(made.failed),
                "failed_examples": made.examples,
                "extra": labels.extra,
                "extra_examples": list(labels.extra_examples),
                "moved_boxes": made.moved,
                "notes": list(made.notes),
            }
        )
        return
    why = ", ".join(f"{count} {code}" for code, count in sorted(made.failed.items()))
    left_out = words.count(made.failed.total(), "image")
    click.echo(
        f"{store}: {made.store.num_images:,} images x {made.crops} crops, form {made.form}; "
        f"{words.count(made.made, 'unit')} made, {made.kept} kept, {left_out} left out"
        f"{f' ({why})' if why else ''}."
    )
    others = [name for name in made.store.sources() if name != made.source]
    beside = f", beside {', '.join(others)}" if others else ""
    click.echo(f"The labels are source {made.source}{beside}.")


@click.command()
@click.argument("format")
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", help="Which labels, when the store has several.")
@click.option("--keep", type=int, metavar="K", help="Classes written.  [default: all stored]")
@options.json_option
def export(
    format: str, store: str, out: Path, source: str | None, keep: int | None, as_json: bool
) -> None:
    """Write the labels of STORE into the new folder OUT, as another system's files.

    FORMAT is fkd, ml-dr, tinyvit or parquet (needs fkdpipe[parquet]).

    \b
    Example:
      fkdpipe export fkd store soft_labels --keep 5
    """
    from fkdpipe import interchange
    from fkdpipe.common import words
    from fkdpipe.interchange.exporting import ExportSettings
    from fkdpipe.storage.store import open_store

    write = interchange.choose(interchange.EXPORTS, format)
    reporter = terminal.reporter()
    wanted = ExportSettings(source=source, keep=keep)
    made = write(open_store(store), out, wanted, reporter=reporter)
    if as_json:
        found = {"images": made.images, "files": made.files, "notes": list(made.notes)}
        terminal.print_json(found)
        return
    files = words.count(made.files, "file")
    click.echo(f"{out}: labels of {words.count(made.images, 'image')} in {files}.")
    for note in made.notes:
        click.echo(f"note: {note}")
