"""`fkdpipe verify` and `fkdpipe thin`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fkdpipe.commands import options, terminal

if TYPE_CHECKING:
    from fkdpipe.storage.store import Store
    from fkdpipe.storage.verify import Problem


@click.command()
@click.argument("store")
@click.option("--full", is_flag=True, help="Read everything: checksums, values, local cache.")
@click.option("--data", type=click.Path(path_type=Path), help="Also compare this image folder.")
@click.option(
    "--teacher",
    multiple=True,
    metavar="NAME[=FILE]",
    help="Run it again on a sample of crops (needs --data).",
)
@click.option("--teacher-weight", multiple=True, type=float, help="As for generate.")
@click.option(
    "--class-map", multiple=True, type=click.Path(path_type=Path), help="As for generate."
)
@click.option("--basis", type=click.Path(path_type=Path), help="Of stored components.")
@click.option("--source", help="Which labels, when the store has several.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Crops run again.",
)
@options.cache_option
@options.device_option
@options.json_option
def verify(
    store: str,
    full: bool,
    data: Path | None,
    teacher: tuple[str, ...],
    cache: Path | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Compare STORE with its own records; exit code 1 when something is wrong.

    \b
    Example:
      fkdpipe verify store --full
    """
    from fkdpipe.common.errors import StoreError, UsageError
    from fkdpipe.storage import verify as verifying
    from fkdpipe.storage.store import open_store

    if teacher and data is None:
        raise UsageError("--teacher needs --data: the images its crops are cut from.")
    opened = open_store(store)
    reporter = terminal.reporter()
    try:
        units = sum(opened.units_of(part) for part in opened.parts.values())
    except StoreError:
        units = 0  # verify says what is wrong with its records
    with reporter.task("verify", units, "units") as advance:
        problems = verifying.verify(
            opened, full=full, cache_dir=options.cache_dir(cache), on_unit=advance
        )
    notes: list[str] = []
    if data is not None and units:
        problems += _against_data(opened, data, teacher, notes, **how)
    if as_json:
        found = [problem.to_json() for problem in problems]
        terminal.print_json({"ok": not problems, "problems": found})
    else:
        for problem in problems:
            unit = f" unit {problem.unit}" if problem.unit >= 0 else ""
            click.echo(f"{problem.code}: {problem.part}{unit}: {problem.detail}")
        for note in notes:
            click.echo(note)
        click.echo(f"{store}: {'ok' if not problems else f'{len(problems)} problems'}")
    if problems:
        raise click.exceptions.Exit(1)


def _against_data(
    store: Store,
    data: Path,
    teacher: tuple[str, ...],
    notes: list[str],
    *,
    teacher_weight: tuple[float, ...],
    class_map: tuple[Path, ...],
    basis: Path | None,
    source: str | None,
    sample: int,
    device: str,
) -> list[Problem]:
    from fkdpipe.common.errors import ModelError, StoreError
    from fkdpipe.labelgen import check
    from fkdpipe.networks import features, teachers
    from fkdpipe.networks.feature_layers import needs_of
    from fkdpipe.networks.models import parse_spec
    from fkdpipe.storage.verify import Problem

    try:
        problems = check.folder(store, data)
    except StoreError as error:
        return [Problem("no-record", "images", 0, str(error))]
    if not teacher:
        return problems
    where = options.choose_device(device)
    parts = [p for p in store.parts.values() if p.kind in ("labels", "features")]
    parts = [p for p in parts if source is None or p.source == source]
    if not parts:
        raise ModelError(f"{store.url} has no labels or features of {source or 'any source'}.")
    specs = [parse_spec(text) for text in teacher]
    named = [
        p for p in parts if [t["name"] for t in p.settings["teachers"]] == [s.name for s in specs]
    ]
    parts = named or parts
    loaded = teachers.load_teachers(
        specs,
        class_names=store.images.class_names if any(p.kind == "labels" for p in parts) else (),
        weights=teacher_weight,
        class_maps=[teachers.read_class_map(file) for file in class_map],
        precision=parts[0].settings["precision"] or "float32",  # unknown of imports
        device=where,
        needs=needs_of({part.layer for part in parts}),
    )
    fitted = features.load_basis(basis) if basis else None
    changed = {part.path: check.other_teachers(part, loaded) for part in parts}
    if all(changed.values()):
        return problems + [
            Problem("teacher-differs", path, -1, f"made by other teachers: {'; '.join(found)}")
            for path, found in changed.items()
        ]
    for part in (part for part in parts if not changed[part.path]):
        checked = check.teacher(
            store, part, data, loaded, device=where, basis=fitted, sample=sample
        )
        problems += checked.problems
        notes.append(
            f"{part.path}: the teacher agrees on {checked.crops} crops within {checked.worst:.2g} "
            f"(allowed {checked.allowed:.2g})"
            if not checked.problems
            else f"{part.path}: differs by up to {checked.worst:.2g}"
        )
    return problems


@click.command()
@click.argument("store")
@click.argument("out")
@click.option("--crops", type=int, metavar="M", help="Keep the first M crops of each image.")
@click.option("--form", help="Poorer form of the labels, for example topk:5:compact.")
@click.option("--source", help="Which labels, when the store has several.")
@click.option("--derive-boxes", is_flag=True, help="Keep the seed and a checksum, not the boxes.")
def thin(
    store: str,
    out: str,
    crops: int | None,
    form: str | None,
    source: str | None,
    derive_boxes: bool,
) -> None:
    """Make OUT, a smaller store, from STORE; no teacher runs.

    \b
    Example:
      fkdpipe thin store small --crops 50 --form topk:5:compact
    """
    from fkdpipe.common import words
    from fkdpipe.inspect.report import measure
    from fkdpipe.storage import thin as thinning
    from fkdpipe.storage.labels import parse_form
    from fkdpipe.storage.location import open_location
    from fkdpipe.storage.store import open_store

    wanted = thinning.Thinning(
        crops=crops,
        form=parse_form(form) if form else None,
        source=source,
        derived_boxes=derive_boxes,
    )
    opened = open_store(store)
    reporter = terminal.reporter()
    with reporter.task("thin", opened.num_images, "images") as advance:
        made = thinning.thin(opened, open_location(out), wanted, on_images=advance)
    before, after = (measure(s) for s in (opened, made))
    click.echo(
        f"{out}: {after.images:,} images x {after.crops_per_image} crops, form {after.form}, "
        f"{words.size(after.stored_bytes)} "
        f"({before.stored_bytes / after.stored_bytes:.1f} times smaller)"
    )
