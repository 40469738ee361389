"""What a trained backbone is worth elsewhere: fine-tuning and linear probing on image folders.

Each trial is an ordinary training run with the folder's own classes and a new classifier: `train`
with a step schedule that drops at 1/3 and 2/3, as KDEP's transfer experiments have it.
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
    """A transfer experiment. Every mode, learning rate and seed is a trial on every folder."""

    modes: tuple[Mode, ...] = ("fine-tune", "probe")
    """fine-tune trains all weights, probe the classifier alone on the frozen backbone."""
    lr: tuple[PositiveFloat, ...] = (0.01, 0.001)
    """Learning rates, of which the best is reported."""
    seeds: tuple[Seed, ...] = (0,)
    """Of classifier, order and crops."""
    epochs: PositiveInt = 150
    """Of every trial."""
    batch_size: PositiveInt = 64
    """Images per optimiser step, over all processes."""
    weight_decay: NonNegativeFloat = 5e-4
    """Decay of the weights."""
    fraction: Share = 1.0
    """Share of the images of every class that is trained on, chosen by the seed."""
    size: Annotated[int, Field(ge=8)] | None = None
    """Side of the input in pixels; by default the backbone's own."""
    crop: CropDistribution = field(default_factory=CropDistribution)
    """The distribution of the random crops."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the forward pass; auto is bfloat16 on GPUs that have it, else float32."""
    threads: PositiveInt | None = None
    """Of the replay; by default the machine's cores."""

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
    """Epochs before which the rate falls: after a third and two thirds, never before the first."""
    return tuple(sorted({epochs // 3, 2 * epochs // 3} - {0}))


@dataclass(frozen=True)
class Trial:
    """One run. top1, top5: percent on the held-out images after the last epoch."""

    data: str
    mode: Mode
    lr: float
    seed: int
    top1: float
    top5: float


@dataclass(frozen=True)
class Row:
    """A folder and a mode at its best learning rate: mean and deviation of top-1 over seeds.

    std: None for a single seed. top5: mean, percent.
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
    """All trials, each in a folder of its own below `out`; finished ones are not run again.

    Of several processes the first returns them, the others nothing.

    Args:
        model: a run folder, NAME=FILE, or NAME for the library's pretrained weights.
        spec: what it names, where the caller knows it.

    Raises:
        ImagesError: a folder without train/ and val/. UsageError: two folders of one name.
        ModelError, TrainingError: what they say.
    """
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(set(names)) != len(names):
        raise UsageError(f"the folders are told apart by their names; found {', '.join(names)}.")
    for folder in folders:
        images.split_root(folder, "val")
    trials = []
    for (name, folder), mode, lr, seed in itertools.product(
        zip(names, folders, strict=True), settings.modes, settings.lr, settings.seeds
    ):
        place = out / f"{name}-{mode}-lr{lr:g}-seed{seed}"
        log.info("%s: %s, learning rate %g, seed %d", folder, mode, lr, seed)
        prepared = run.prepare(
            settings.trial(model, mode, lr, seed), folder, place,
            student_spec=spec, cache_dir=place, device=device, rank=rank, reporter=reporter,
        )  # fmt: skip
        loop.train(prepared)
        # From the record, so that a trial that was finished before counts as well.
        last = metrics.last_evaluation(place / "metrics.jsonl")
        assert last is not None
        trials.append(Trial(name, mode, lr, seed, last["top1"], last["top5"]))
    return trials


def summarise(trials: Sequence[Trial]) -> list[Row]:
    """One row for every folder and mode, at the learning rate of the best mean top-1."""
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
    """Trials by some of their fields, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(getattr(trial, name) for name in names), []).append(trial)
    yield from groups.items()
