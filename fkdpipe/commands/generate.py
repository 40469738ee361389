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
    from fkdpipe.labelgen.settings import GenerateSettings
    from fkdpipe.teachers import Teacher


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
@click.option("--seed", type=int, help="Of the crops and the order of images.  [default: 0]")
@click.option("--source", help="Name of the labels in the store.  [default: the teachers' names]")
@click.option(
    "--class-map",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Whose output is which class.",
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
    with --part on several machines. More --crops, another teacher or --features add to a store.

    \b
    Example:
      fkdpipe generate images store --teacher resnet50 --form topk:10 --crops 200
    """
    from fkdpipe.labelgen.settings import GenerateSettings

    settings = options.resolve(GenerateSettings, recipe, assignments, flags)
    from fkdpipe import distributed
    from fkdpipe.errors import UsageError
    from fkdpipe.labelgen import dry_run as forecasting
    from fkdpipe.labelgen import generate as run
    from fkdpipe.labelgen import plan as planning
    from fkdpipe.labelgen import repair as repairing
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
        f"{store}: {result.made} units made, {result.kept} kept, "
        f"{len(result.failed)} images left out; {state}."
    )
    if restored is not None:
        click.echo(
            f"{len(restored.records)} records restored, {len(withdrawn.units)} units made again"
        )
        for path, count in Counter(path for path, _ in withdrawn.left).items():
            click.echo(f"{path}: {count} units are still broken; --repair with what made them")


def _load_teachers(data: Path, settings: GenerateSettings, device: Any) -> list[Teacher]:
    from fkdpipe import images, teachers
    from fkdpipe.models import parse_spec

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
    from fkdpipe.storage.report import readable_bytes

    click.echo(
        f"{f.images:,} images x {f.crops_per_image} crops ({f.rejected} files rejected), "
        f"{f.units} units"
    )
    click.echo(f"store   {readable_bytes(f.stored_bytes)}, {f.bytes_per_crop:.1f} bytes per crop")
    click.echo(
        f"time    {terminal.readable_time(f.seconds)} for one process at {f.crops_per_s:,.0f} "
        f"crops/s, measured on {f.sampled_crops:,} crops"
    )
    gpu = f", GPU {readable_bytes(f.gpu_bytes)}" if f.gpu_bytes else ""
    click.echo(f"memory  {readable_bytes(f.buffer_bytes)} for a unit in the making{gpu}")
