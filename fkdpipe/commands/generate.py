"""`fkdpipe generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fkdpipe.commands import options, terminal


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
@options.device_option
@options.recipe_options
def generate(
    data: Path,
    store: str,
    part: str | None,
    device: str,
    recipe: Path | None,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Label recorded crops of the images in DATA, into STORE.

    Started again, it makes what is missing. Several processes share a store under torchrun, or
    with --part on several machines.

    \b
    Example:
      fkdpipe generate images store --teacher resnet50 --form topk:10 --crops 200
    """
    from fkdpipe.labelgen.settings import GenerateSettings

    settings = options.resolve(GenerateSettings, recipe, assignments, flags)
    from fkdpipe import distributed, images, teachers
    from fkdpipe.labelgen import generate as run
    from fkdpipe.labelgen import plan as planning
    from fkdpipe.models import parse_spec
    from fkdpipe.storage.location import open_location
    from fkdpipe.train.run import default_threads

    rank = distributed.parse_part(part) if part else distributed.current()
    reporter = terminal.reporter()
    where = options.choose_device(device, rank.local)
    specs = [parse_spec(text) for text in settings.teacher]
    root = images.split_root(data, "train")
    loaded = teachers.load_teachers(
        specs,
        class_names=images.class_folders(root),
        weights=settings.teacher_weight,
        class_maps=[images.read_class_map(file) for file in settings.class_map],
        precision=settings.precision,
        device=where,
    )
    plan = planning.prepare(
        open_location(store), data, settings, loaded, device=where, rank=rank, reporter=reporter
    )
    resources = run.Resources(
        device=where,
        batch=settings.batch,
        threads=settings.threads or default_threads(),
        rank=rank,
    )
    result = run.generate(plan, loaded, resources, reporter=reporter)
    state = "complete" if result.sealed else "other parts are still to be made"
    click.echo(
        f"{store}: {result.made} units made, {result.kept} kept, "
        f"{len(result.failed)} images left out; {state}."
    )
