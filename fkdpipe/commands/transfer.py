"""`fkdpipe transfer`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from fkdpipe.commands import options, terminal


@contextlib.contextmanager
def _kept(out: Path | None) -> Iterator[None]:
    """Say that an interrupted command keeps nothing without --out."""
    from fkdpipe.common.errors import TrainingError

    try:
        yield
    except (KeyboardInterrupt, TrainingError) as error:
        stopped = isinstance(error, KeyboardInterrupt) or error.code == "stopped"
        if not stopped or out is not None:
            raise
        raise KeyboardInterrupt("without --out, no trial is kept.") from error


@click.command(cls=options.WithSettings)
@click.argument("model", metavar="MODEL")
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--mode", "modes", multiple=True, help="Training mode: fine-tune or probe.  [default: both]"
)
@click.option("--epochs", type=int, help="Number of epochs per trial.  [default: 150]")
@click.option("--batch-size", type=int, help="Batch size in images.  [default: 64]")
@click.option(
    "--lr",
    type=float,
    multiple=True,
    help="Learning rate; repeat to try several.  [default: 0.01, 0.001]",
)
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    help="Random seed; repeat for one trial each.  [default: 0]",
)
@click.option("--size", type=int, help="Input size in pixels.  [default: the model's]")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to keep the runs in, for resuming."
)
@options.device_option
@options.json_option
@options.recipe_options
def transfer(
    model: str,
    data: tuple[Path, ...],
    out: Path | None,
    device: str,
    as_json: bool,
    recipe: Path | None,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Fine-tune MODEL and train a linear probe on each folder in DATA.

    MODEL is a run folder, NAME=FILE, or NAME for pretrained weights; its classifier is replaced.
    DATA are image folders with train/ and val/. If there are several learning rates, the one with
    the best mean over the seeds is shown.

    \b
    Example:
      fkdpipe transfer runs/student pets flowers --seed 0 --seed 1 --seed 2
    """
    from fkdpipe.downstream.transfer import TransferSettings

    settings = options.resolve(TransferSettings, recipe, assignments, flags)
    import dataclasses
    import tempfile

    from fkdpipe.common import distributed
    from fkdpipe.common.progress import silent
    from fkdpipe.downstream import transfer as transferring
    from fkdpipe.train import parallel

    rank = distributed.current()
    where = options.choose_device(device, rank.local)
    reporter = terminal.reporter() if rank.main else silent
    with (
        _kept(out),
        tempfile.TemporaryDirectory(prefix="fkdpipe-transfer-") as temporary,
        parallel.group(rank, where),
    ):
        trials = transferring.transfer(
            model, data, out or Path(temporary), settings,
            spec=options.networks([model], [model])[0], device=where, rank=rank, reporter=reporter,
        )  # fmt: skip
    if not rank.main:
        return
    rows = transferring.summarise(trials)
    if as_json:
        terminal.print_json(
            {
                "model": model,
                "rows": [dataclasses.asdict(row) for row in rows],
                "trials": [dataclasses.asdict(trial) for trial in trials],
            }
        )
        return
    columns = ["data", "mode", "learning rate", "top-1 %", "± over seeds", "top-5 %", "seeds"]
    cells = [
        [
            row.data,
            row.mode,
            f"{row.lr:g}",
            f"{row.top1:.2f}",
            "" if row.std is None else f"{row.std:.2f}",
            f"{row.top5:.2f}",
            str(row.seeds),
        ]
        for row in rows
    ]
    terminal.print_table(f"Transfer of {model}", columns, cells)
