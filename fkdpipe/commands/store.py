"""`fkdpipe verify` and `fkdpipe thin`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fkdpipe.commands import options, terminal

if TYPE_CHECKING:
    from fkdpipe.labelgen.check import Checked
    from fkdpipe.storage.store import Store


@click.command()
@click.argument("store")
@click.option("--full", is_flag=True, help="Read all data: checksums, values and the local cache.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Image folder to compare with the store."
)
@click.option(
    "--teacher",
    multiple=True,
    metavar="NAME[=FILE]",
    help="Teacher to rerun on a sample of crops (requires --data).",
)
@click.option(
    "--teacher-weight", multiple=True, type=float, help="Weight of a teacher, as for generate."
)
@click.option(
    "--class-map",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Class map of a teacher, as for generate.",
)
@options.numbered_option
@click.option(
    "--basis", type=click.Path(path_type=Path), help="Basis file of the stored components."
)
@click.option("--source", help="Labels to compare, if the store has several.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Number of crops to rerun the teacher on.",
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
    """Check STORE against its own records.

    The exit code is 1 if there are problems.

    \b
    Example:
      fkdpipe verify store --full
    """
    from fkdpipe.common.errors import StoreError, UsageError
    from fkdpipe.storage import verify as verifying
    from fkdpipe.storage.store import open_store

    if teacher and data is None:
        raise UsageError("--teacher requires --data, the images of the store.")
    opened = open_store(store)
    reporter = terminal.reporter()
    try:
        units = sum(opened.units_of(part) for part in opened.parts.values())
    except StoreError:
        units = 0  # verify reports the damaged records
    with reporter.task("verify", units, "units") as advance:
        problems = verifying.verify(
            opened, full=full, cache_dir=options.cache_dir(cache), on_unit=advance
        )
    checked: list[Checked] = []
    if data is not None and units:
        from fkdpipe.labelgen import check

        try:
            problems += check.folder(opened, data)
        except StoreError as error:
            problems.append(verifying.Problem("no-record", "images", 0, str(error)))
        else:
            checked = _run_again(opened, data, teacher, **how) if teacher else []
    problems += [problem for each in checked for problem in each.problems]
    if as_json:
        records = [problem.to_json() for problem in problems]
        terminal.print_json({"ok": not problems, "problems": records})
    else:
        for problem in problems:
            unit = f" unit {problem.unit}" if problem.unit >= 0 else ""
            click.echo(f"{problem.code}: {problem.part}{unit}: {problem.detail}")
        for each in checked:
            if each.crops:
                click.echo(_comparison(each))
        click.echo(f"{store}: {'ok' if not problems else f'{len(problems)} problems'}")
    if problems:
        raise click.exceptions.Exit(1)


def _run_again(
    store: Store,
    data: Path,
    teacher: tuple[str, ...],
    *,
    teacher_weight: tuple[float, ...],
    class_map: tuple[Path, ...],
    numbered: bool,
    basis: Path | None,
    source: str | None,
    sample: int,
    device: str,
) -> list[Checked]:
    """Rerun the teachers on a sample of each part that they generated."""
    from fkdpipe.labelgen import check
    from fkdpipe.networks import features, teachers
    from fkdpipe.networks.feature_layers import needs_of

    specs = options.networks(teacher, teacher)
    parts = check.parts_of(store, source, [spec.name for spec in specs])
    where = options.choose_device(device)
    loaded = teachers.load_teachers(
        specs,
        class_names=store.images.class_names if any(p.kind == "labels" for p in parts) else (),
        weights=teacher_weight,
        class_maps=class_map,
        numbered=numbered,
        precision=parts[0].settings.precision or "float32",  # not recorded by imports
        device=where,
        needs=needs_of({part.layer for part in parts}),
    )
    fitted = features.load_basis(basis) if basis else None
    return check.all_parts(store, parts, data, loaded, device=where, basis=fitted, sample=sample)


def _comparison(checked: Checked) -> str:
    if checked.problems:
        return f"{checked.part}: differs by up to {checked.worst:.2g}"
    return (
        f"{checked.part}: the teacher agrees on {checked.crops} crops within {checked.worst:.2g} "
        f"(allowed {checked.allowed:.2g})"
    )


@click.command()
@click.argument("store")
@click.argument("out")
@click.option("--crops", type=int, metavar="M", help="Number of crops per image to keep.")
@click.option("--form", help="Smaller label form, for example topk:5:compact.")
@click.option("--source", help="Labels to keep, if the store has several.")
@click.option(
    "--derive-boxes", is_flag=True, help="Replace the boxes with their seed and a checksum."
)
def thin(
    store: str,
    out: str,
    crops: int | None,
    form: str | None,
    source: str | None,
    derive_boxes: bool,
) -> None:
    """Write a smaller copy of STORE to OUT; no teacher runs.

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

    subset = thinning.Subset(
        crops=crops,
        form=parse_form(form) if form else None,
        source=source,
        derived_boxes=derive_boxes,
    )
    opened = open_store(store)
    reporter = terminal.reporter()
    with reporter.task("thin", opened.num_images, "images") as advance:
        thinned = thinning.thin(opened, open_location(out), subset, on_images=advance)
    before, after = (measure(s) for s in (opened, thinned))
    click.echo(
        f"{out}: {after.images:,} images x {after.crops_per_image} crops, form {after.form}, "
        f"{words.size(after.stored_bytes)} "
        f"({before.stored_bytes / after.stored_bytes:.1f} times smaller)"
    )
