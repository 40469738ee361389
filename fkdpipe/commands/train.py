"""`fkdpipe train` and `fkdpipe evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fkdpipe.commands import options, terminal


@click.command(cls=options.WithSettings)
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("store", required=False)
@click.option(
    "--student",
    metavar="NAME[=FILE]",
    help="Student: timm model or python:MODULE:FUNCTION (random weights without =FILE), or a run "
    "folder.",
)
@click.option(
    "--new-head",
    is_flag=True,
    help="Replace the student's classifier by a new one, to fine-tune on other classes.",
)
@click.option(
    "--target",
    help="Training target, for example marginal-smoothing:5; required with STORE.  "
    "[default: ground-truth]",
)
@click.option(
    "--crops-per-image",
    type=int,
    metavar="m",
    help="Number of crops per image in a batch.  [default: 1]",
)
@click.option(
    "--epochs",
    type=int,
    help="Number of epochs; a pass with m crops per image counts as m.  [default: 100]",
)
@click.option(
    "--batch-size", type=int, help="Batch size in crops, over all processes.  [default: 256]"
)
@click.option("--lr", type=float, help="Learning rate.  [default: 0.1]")
@click.option("--size", type=int, help="Input size in pixels.  [default: the model's]")
@click.option("--seed", type=int, help="Seed for weights, order and crops.  [default: 0]")
@click.option("--fraction", type=float, help="Share of the images of each class.  [default: 1]")
@click.option("--source", help="Labels to train on, if the store has several.")
@click.option(
    "--method",
    help="Distillation method, for example fkd or kd; see docs/methods.md.  [default: fkd]",
)
@click.option(
    "--teacher",
    metavar="NAME[=FILE]",
    help="Teacher that runs beside the student, for methods that need one.",
)
@click.option(
    "--precision",
    help="Student precision: auto, float32, bfloat16 or float16.  [default: auto]",
)
@click.option("--replay", help="Replay backend: auto, cpu or dali.  [default: auto]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Run folder: checkpoints, metrics and the student.",
)
@click.option(
    "--allow-partial", is_flag=True, help="Use the finished units of an unfinished store."
)
@options.cache_option
@options.device_option
@options.json_option
@options.recipe_options
def train(
    data: Path,
    store: str | None,
    out: Path,
    allow_partial: bool,
    cache: Path | None,
    device: str,
    as_json: bool,
    recipe: Path | None,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Train a student on the images in DATA and the labels in STORE.

    Without STORE, it trains on new random crops and the classes of the folder (--target
    ground-truth). Run the same command again to resume from the last checkpoint. For several GPUs,
    use torchrun --nproc-per-node N -m fkdpipe train ... with the same arguments.

    To use your own network, pass --student python:PACKAGE.MODULE:FUNCTION, as for a teacher in
    generate. If FUNCTION has a parameter num_classes, it receives the number of classes.

    \b
    Example:
      fkdpipe train images store --student resnet18 --target marginal-smoothing:5 \\
          --crops-per-image 4 --epochs 100 --out runs/student
    """
    from fkdpipe.train.settings import TrainSettings, describe

    flags["optimizer.lr"] = flags.pop("lr")
    flags["method.name"] = flags.pop("method")
    settings = options.resolve(TrainSettings, recipe, assignments, flags, describe=describe)
    from fkdpipe.common import distributed
    from fkdpipe.common.progress import silent
    from fkdpipe.storage.store import open_store
    from fkdpipe.train import loop, parallel
    from fkdpipe.train.run import prepare

    rank = distributed.current()
    where = options.choose_device(device, rank.local)
    teachers = [] if settings.teacher is None else [settings.teacher]
    with parallel.group(rank, where):
        run = prepare(
            settings,
            data,
            out,
            student_spec=options.networks([flags["student"]], [settings.student])[0],
            teacher_spec=next(iter(options.networks([flags["teacher"]], teachers)), None),
            store=open_store(store) if store else None,
            cache_dir=options.cache_dir(cache),
            allow_partial=allow_partial,
            device=where,
            rank=rank,
            reporter=terminal.reporter() if rank.main else silent,
        )
        result = loop.train(run)
    if not rank.main:
        return
    if as_json:
        terminal.print_json(asdict(result) | {"student": str(result.student)})
        return
    accuracy = "" if result.top1 is None else f", top-1 {result.top1:.2f} %"
    click.echo(f"{result.steps} steps, {result.epochs} epochs{accuracy}; student: {result.student}")


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("model", metavar="MODEL")
@click.option(
    "--split",
    type=click.Choice(["val", "train"]),
    help="Split to evaluate on.  [default: val, or DATA itself if it holds the class folders]",
)
@click.option(
    "--class-map",
    type=click.Path(path_type=Path),
    help="File that maps the model's outputs to classes, as for generate.",
)
@click.option(
    "--real",
    type=click.Path(path_type=Path),
    help="ImageNet-ReaL's real.json, with several correct classes per image.",
)
@options.numbered_option
@click.option(
    "--precision",
    default="float32",
    help="Model precision: float32, bfloat16 or float16.  [default: float32]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Batch size in images.",
)
@options.device_option
@options.json_option
def evaluate(
    data: Path,
    model: str,
    split: str | None,
    class_map: Path | None,
    real: Path | None,
    numbered: bool,
    precision: str,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure the top-1 and top-5 accuracy of MODEL on DATA.

    MODEL is a run folder or NAME[=FILE], as for --teacher. Images are resized and centre-cropped
    as in timm. With --real, images without a correct class are left out.

    \b
    Example:
      fkdpipe evaluate images runs/student --json
    """
    from fkdpipe.common import words
    from fkdpipe.train.evaluate import evaluate as run

    (spec,) = options.networks([model], [model])
    accuracy = run(
        spec,
        data,
        split=split,  # type: ignore[arg-type]
        class_map=class_map,
        numbered=numbered,
        real=real,
        precision=precision,  # type: ignore[arg-type]
        batch_size=batch_size,
        device=device,
        reporter=terminal.reporter(),
    )
    if as_json:
        terminal.print_json(asdict(accuracy))
        return
    left_out = f"; {words.count(accuracy.skipped, 'file')} left out" if accuracy.skipped else ""
    click.echo(
        f"{model}: top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} % "
        f"on {words.count(accuracy.images, 'image')}{left_out}"
    )
