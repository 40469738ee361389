"""What a running training holds, and how it is saved, taken up again and exported."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import TrainingError
from fkdpipe.common.progress import Reporter, silent
from fkdpipe.networks import weight_files
from fkdpipe.networks.feature_layers import FeatureNetwork
from fkdpipe.networks.models import Loaded
from fkdpipe.networks.teachers import Precision, Teacher
from fkdpipe.pixels.images import ImageFolder
from fkdpipe.train import checkpoint, students
from fkdpipe.train.evaluate import Accuracy
from fkdpipe.train.feed import Feed
from fkdpipe.train.labelled_crops import LabelledCrops
from fkdpipe.train.learner import Learner
from fkdpipe.train.methods.interface import Method
from fkdpipe.train.settings import TrainSettings

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


@dataclass
class Run:
    """Everything a running training holds.

    wrapped is the learner as it is called: in DDP, compiled, once it trains. average is the moving
    average of the student. step counts optimiser steps that are done. digest names settings and
    data; a checkpoint of another digest is refused. owed is the epoch after which an evaluation is
    due that has not come to its end.
    """

    settings: TrainSettings
    out: Path
    crops: LabelledCrops
    student: Loaded
    learner: Learner
    wrapped: nn.Module
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: ModelEmaV3 | None
    device: torch.device
    precision: Precision
    rank: Rank
    class_names: tuple[str, ...]
    validation: ImageFolder | None
    digest: str
    step: int = 0
    best_top1: float = -1.0
    last: Accuracy | None = None
    owed: int | None = None
    reporter: Reporter = silent

    @property
    def feed(self) -> Feed:
        return self.crops.feed

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return len(self.feed.order)

    @property
    def module(self) -> FeatureNetwork:
        """The student with its feature layers."""
        return self.learner.student

    @property
    def method(self) -> Method:
        return self.learner.method

    @property
    def judged(self) -> FeatureNetwork:
        """The weights that are evaluated and exported: the moving average where there is one."""
        return self.module if self.average is None else self.average.module


def save(run: Run) -> None:
    """A checkpoint, by the first process. Randomness needs no state: it is drawn from the step."""
    if not run.rank.main:
        return
    content = {
        "step": run.step,
        "digest": run.digest,
        "student": run.module.network.state_dict(),
        "method": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "average": run.average.module.state_dict() if run.average else None,
        "best_top1": run.best_top1,
        "owed": run.owed,
    }
    checkpoint.save(run.out / CHECKPOINTS, run.step, content, keep=run.settings.keep_checkpoints)


def resume(run: Run) -> None:
    """Take up the newest checkpoint, if there is one.

    Raises:
        TrainingError: it cannot be read, or is of another run.
    """
    content = checkpoint.load_latest(run.out / CHECKPOINTS)
    if content is None:
        return
    if content["digest"] != run.digest:
        raise TrainingError(
            f"{run.out} holds a run with other settings or data; name another --out folder.",
            code="other-run",
        )
    run.module.network.load_state_dict(content["student"])
    run.method.load_state_dict(content["method"])
    run.optimizer.load_state_dict(content["optimizer"])
    run.scaler.load_state_dict(content["scaler"])
    if run.average is not None:
        run.average.module.load_state_dict(content["average"])
    run.step, run.best_top1 = int(content["step"]), float(content["best_top1"])
    run.owed = content.get("owed")
    log.info("going on from step %d of %d", run.step, run.steps)


def export(run: Run, name: str) -> Path:
    """The student alone, as others load it; by the first process."""
    file = run.out / name
    if run.rank.main:
        facts = students.export_facts(run.settings, run.student, run.class_names)
        checkpoint.write_atomically(
            file, lambda partial: weight_files.write_export(partial, run.judged.network, facts)
        )
    return file
