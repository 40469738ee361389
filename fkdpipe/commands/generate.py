"""`fkdpipe generate`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fkdpipe.commands import options, terminal

if TYPE_CHECKING:
    from fkdpipe.labelgen.dry_run import Forecast
    from fkdpipe.labelgen.repair import Restored, Withdrawn
    from fkdpipe.labelgen.settings import GenerateSettings
    from fkdpipe.networks.teachers import Teacher


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("store")
@click.option(
    "--teacher",
    multiple=True,
    metavar="NAME[=FILE]",
    help="timm model, torchvision:NAME, or a run folder; several are averaged.",
)
@click.option("--teacher-weight", multiple=True, type=float, help="Share, one per teacher.")
@click.option("--form", help="full, logits, topk:K, topk:K:compact or hard.  [default: topk:10]")
@click.option("--features", multiple=True, metavar="pre|post[:D]|map", help="Features too.")
@click.option("--basis", type=click.Path(path_type=Path), help="Of fit-basis, for pre:D.")
@click.option("--crops", type=int, metavar="M", help="Crops per image.")
@click.option("--seed", type=int, help="Of crops and order.  [default: 0, or the store's]")
@click.option("--source", help="Name of the labels in the store.  [default: the teachers' names]")
@click.option(
    "--class-map",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File: whose output is which class.",
)
@click.option("--temperature", type=float, help="Of the teachers' softmax.  [default: 1]")
@click.option("--precision", help="float32, bfloat16 or float16.  [default: float32]")
@click.option("--batch", type=int, help="Crops per teacher batch.  [default: 64]")
@click.option("--part", metavar="I/N", help="Make the I-th of N parts, counted from 1.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, from a small sample.")
@click.option("--repair", is_flag=True, help="Make broken units again, and nothing else.")
@options.device_option
@options.recipe_options
def generate(
    data: Path,
    store: str,
    part: str | None,
    dry_run: bool,
    repair: bool,
    device: str,
    recipe: Path | None,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Label recorded crops of the images in DATA, into STORE.

    Started again, it makes what is missing. Several processes share a store under torchrun, or
    with --part on several machines. More --crops, another teacher or --features add to a store,
    and its crop distribution, seed and form need not be said again.

    A --class-map file has either one class name per line, in the order of the teacher's outputs,
    or a class folder and the number of its output, from 0, on every line ("n01440764 0"). Lines
    that begin with # are skipped.

    \b
    Example:
      fkdpipe generate images store --teacher resnet50 --form topk:10 --crops 200
    """
    from fkdpipe.labelgen.settings import GenerateSettings

    if repair:
        flags = _with_recorded(store, options.given_table(recipe, assignments, flags), flags)
    settings = options.resolve(GenerateSettings, recipe, assignments, flags)
    from fkdpipe.common import distributed, words
    from fkdpipe.common.errors import UsageError
    from fkdpipe.labelgen import dry_run as forecasting
    from fkdpipe.labelgen import existing
    from fkdpipe.labelgen import generate as run
    from fkdpipe.labelgen import plan as planning
    from fkdpipe.labelgen import repair as repairing
    from fkdpipe.storage import begin
    from fkdpipe.storage.location import open_location

    rank = distributed.parse_part(part) if part else distributed.current()
    if repair and rank.world > 1:
        raise UsageError("--repair is for one process: start it without --part and torchrun.")
    reporter = terminal.reporter()
    where = options.choose_device(device, rank.local)
    loaded = _load_teachers(data, settings, where)
    threads = settings.threads or distributed.default_threads()
    resources = run.Resources(device=where, batch=settings.batch, threads=threads, rank=rank)
    location = open_location(store)
    if dry_run:
        source = settings.source or planning.default_source(loaded)
        settings = existing.as_store(begin.find_store(location), settings, source)
        _print_forecast(forecasting.forecast(data, settings, loaded, resources, reporter=reporter))
        return
    restored = repairing.restore(location, data) if repair else None
    plan = planning.prepare(
        location, data, settings, loaded, device=where, rank=rank, reporter=reporter
    )
    if restored is not None:
        withdrawn = repairing.withdraw(plan, restored)
        resources = replace(resources, batch_of=withdrawn.batch_of)
    result = run.generate(plan, loaded, resources, reporter=reporter)
    state = "complete" if result.sealed else "other parts are still to be made"
    click.echo(
        f"{store}: {words.count(result.made, 'unit')} made, {result.kept} kept, "
        f"{words.count(len(result.failed), 'image')} left out; {state}."
    )
    if restored is not None:
        _print_repair(restored, withdrawn)


def _print_repair(restored: Restored, withdrawn: Withdrawn) -> None:
    from fkdpipe.common import words

    click.echo(
        f"{words.count(len(restored.records), 'record')} restored, "
        f"{words.count(len(withdrawn.units), 'unit')} made again"
    )
    for path, number in Counter(path for path, _ in withdrawn.left).items():
        left = words.count(number, "unit")
        click.echo(f"{path}: {left} still broken; --repair with what made them")


def _with_recorded(store: str, given: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a repair, and what the store records of the source that is not said again.

    Raises:
        UsageError: no teacher is named; says with which options the store was made.
    """
    from fkdpipe.common.errors import StoreError, UsageError
    from fkdpipe.labelgen import existing
    from fkdpipe.storage.location import open_location
    from fkdpipe.storage.store import Store

    try:
        recorded = existing.recorded_options(Store(open_location(store)))
    except StoreError:
        recorded = {}  # damaged records: the repair restores them first
    if not given.get("teacher"):
        made = "".join(f"\n  {existing.as_words(each)}" for each in recorded.values())
        raise UsageError(
            "--repair needs the teacher that made the store: --teacher NAME or NAME=FILE."
            + (f" The store was made with:{made}" if made else "")
        )
    source = given.get("source") or (next(iter(recorded)) if len(recorded) == 1 else "")
    old = {k: v for k, v in recorded.get(source, {}).items() if k != "teacher" and k not in given}
    return {**flags, **old}


def _load_teachers(data: Path, settings: GenerateSettings, device: Any) -> list[Teacher]:
    from fkdpipe.networks import teachers
    from fkdpipe.networks.models import parse_spec
    from fkdpipe.pixels import images

    named = settings.form != "none"  # features alone have no classes to match
    return teachers.load_teachers(
        [parse_spec(text) for text in settings.teacher],
        class_names=images.class_folders(images.split_root(data, "train")) if named else (),
        weights=settings.teacher_weight,
        class_maps=[teachers.read_class_map(file) for file in settings.class_map],
        precision=settings.precision,
        device=device,
        needs=settings.needs,
    )


def _print_forecast(f: Forecast) -> None:
    from fkdpipe.common import words

    click.echo(
        f"{f.images:,} images x {words.count(f.crops_per_image, 'crop')} "
        f"({words.count(f.rejected, 'file')} rejected), {words.count(f.units, 'unit')}"
    )
    click.echo(f"store   {words.size(f.stored_bytes)}, {f.bytes_per_crop:.1f} bytes per crop")
    click.echo(
        f"time    {words.duration(f.seconds)} for one process at {f.crops_per_s:,.0f} "
        f"crops/s, measured on {f.sampled_crops:,} crops"
    )
    gpu = f", GPU {words.size(f.gpu_bytes)}" if f.gpu_bytes else ""
    click.echo(f"memory  {words.size(f.buffer_bytes)} for a unit in the making{gpu}")
