"""Transfer learning of a backbone: fine-tuning and linear probing on image folders.

Each trial is a training run with the folder's classes and a new classifier. The step schedule drops
at 1/3 and 2/3 of the epochs, as in KDEP's transfer experiments.
"""

from __future__ import annotations

import itertools
import logging
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from fkdpipe.common import config
from fkdpipe.common.config import Seed, Share
from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import UsageError
from fkdpipe.common.progress import Reporter, silent
from fkdpipe.networks.models import ModelSpec
from fkdpipe.pixels import images
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.train import loop, metrics, run
from fkdpipe.train.settings import OptimizerSettings, ScheduleSettings, TrainSettings

log = logging.getLogger(__name__)

Mode = Literal["fine-tune", "probe"]


@config.settings
class TransferSettings:
    """A transfer experiment: one trial per folder, mode, learning rate and seed."""

    modes: tuple[Mode, ...] = ("fine-tune", "probe")
    """fine-tune trains all weights; probe trains only the classifier on the frozen backbone."""
    lr: tuple[PositiveFloat, ...] = (0.01, 0.001)
    """Learning rates; the best one is reported."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds for classifier, order and crops."""
    epochs: PositiveInt = 150
    """Number of epochs per trial."""
    batch_size: PositiveInt = 64
    """Images per optimiser step, over all processes."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay."""
    fraction: Share = 1.0
    """Fraction of the images of every class to train on, chosen by the seed."""
    size: Annotated[int, Field(ge=8)] | None = None
    """Side of the input in pixels; default: the backbone's."""
    crop: CropDistribution = field(default_factory=CropDistribution)
    """Crop distribution."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward pass; auto: bfloat16 on GPUs that support it, else float32."""
    threads: PositiveInt | None = None
    """Threads of the replay; default: the number of CPU cores."""

    @field_validator("modes", "lr", "seeds")
    @classmethod
    def _each_once(cls, values: tuple) -> tuple:
        if not values or len(set(values)) != len(values):
            raise UsageError(f"must name each value once; found {list(values)}")
        return values

    def trial(self, model: str, mode: Mode, lr: float, seed: int) -> TrainSettings:
        """The training run of one trial."""
        return TrainSettings(
            student=model,
            pretrained=True,
            new_head=True,
            train_only="classifier" if mode == "probe" else "all",
            epochs=self.epochs,
            batch_size=self.batch_size,
            fraction=self.fraction,
            size=self.size,
            crop=self.crop,
            seed=seed,
            precision=self.precision,
            threads=self.threads,
            eval_every=self.epochs,
            optimizer=OptimizerSettings(lr=lr, weight_decay=self.weight_decay),
            schedule=ScheduleSettings(name="step", milestones=drops(self.epochs)),
        )


def drops(epochs: int) -> tuple[int, ...]:
    """Epochs at which the learning rate drops: after 1/3 and 2/3, never before the first."""
    return tuple(sorted({epochs // 3, 2 * epochs // 3} - {0}))


@dataclass(frozen=True)
class Trial:
    """One run. top1, top5: percent on the validation images after the last epoch."""

    data: str
    mode: Mode
    lr: float
    seed: int
    top1: float
    top5: float


@dataclass(frozen=True)
class Row:
    """Results over seeds for a folder and a mode, at the best learning rate.

    Attributes:
        top1, top5: means, in percent. std: standard deviation of top1; None for a single seed.
    """

    data: str
    mode: Mode
    lr: float
    top1: float
    std: float | None
    top5: float
    seeds: int


def transfer(
    model: str,
    folders: Sequence[Path],
    out: Path,
    settings: TransferSettings,
    *,
    spec: ModelSpec | None = None,
    device: torch.device,
    rank: Rank = Rank(),
    reporter: Reporter = silent,
) -> list[Trial]:
    """Run all trials, each in its own folder below `out`; finished ones are not run again.

    Args:
        model: a run folder, NAME=FILE, or NAME for the library's pretrained weights.
        spec: overrides the parsed `model`.

    Raises:
        ImagesError: a folder without train/ and val/. UsageError: two folders with the same name.
        ModelError, TrainingError: a trial cannot be run.
    """
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(set(names)) != len(names):
        raise UsageError(f"folders must have distinct names; found {', '.join(names)}.")
    for folder in folders:
        images.split_root(folder, "val")
    trials = []
    for (name, folder), mode, lr, seed in itertools.product(
        zip(names, folders, strict=True), settings.modes, settings.lr, settings.seeds
    ):
        folder_out = out / f"{name}-{mode}-lr{lr:g}-seed{seed}"
        log.info("%s: %s, learning rate %g, seed %d", folder, mode, lr, seed)
        trial_run = run.prepare(
            settings.trial(model, mode, lr, seed), folder, folder_out,
            student_spec=spec, cache_dir=folder_out, device=device, rank=rank, reporter=reporter,
        )  # fmt: skip
        loop.train(trial_run)
        # Read from the metrics file, which trials finished earlier have too.
        last = metrics.last_evaluation(folder_out / "metrics.jsonl")
        assert last is not None
        trials.append(Trial(name, mode, lr, seed, last["top1"], last["top5"]))
    return trials


def summarise(trials: Sequence[Trial]) -> list[Row]:
    """One row per folder and mode, at the learning rate with the best mean top-1."""
    rows = []
    for (data, mode), group in _grouped(trials, "data", "mode"):
        means = [
            Row(
                data=data,
                mode=mode,
                lr=lr,
                top1=statistics.mean(t.top1 for t in same),
                std=statistics.stdev(t.top1 for t in same) if len(same) > 1 else None,
                top5=statistics.mean(t.top5 for t in same),
                seeds=len(same),
            )
            for (lr,), same in _grouped(group, "lr")
        ]
        rows.append(max(means, key=lambda row: row.top1))
    return rows


def _grouped(trials: Sequence[Trial], *names: str) -> Iterator[tuple[tuple[Any, ...], list[Trial]]]:
    """Group trials by some fields, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(getattr(trial, name) for name in names), []).append(trial)
    yield from groups.items()
