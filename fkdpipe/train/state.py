"""The state of a run: saving, resuming and exporting it."""

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
    """The state of a run.

    Attributes:
        wrapped: the learner as called in a step, in DDP and compiled once training has started.
        average: moving average of the student. step: completed optimiser steps.
        digest: of settings and data; a checkpoint with another digest is refused.
        pending_eval_epoch: epoch of an evaluation that is due but not complete; None if none is.
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
    pending_eval_epoch: int | None = None
    reporter: Reporter = silent

    @property
    def feed(self) -> Feed:
        return self.crops.feed

    @property
    def steps(self) -> int:
        """Optimiser steps in the whole run."""
        return len(self.feed.order)

    @property
    def module(self) -> FeatureNetwork:
        """The student with its feature layers."""
        return self.learner.student

    @property
    def method(self) -> Method:
        return self.learner.method

    @property
    def eval_network(self) -> FeatureNetwork:
        """The network to evaluate and export: the moving average if there is one."""
        return self.module if self.average is None else self.average.module


def save(run: Run) -> None:
    """Write a checkpoint, in the first process. There is no RNG state: the step is the seed."""
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
        "pending_eval_epoch": run.pending_eval_epoch,
    }
    checkpoint.save(run.out / CHECKPOINTS, run.step, content, keep=run.settings.keep_checkpoints)


def resume(run: Run) -> None:
    """Load the newest checkpoint, if there is one.

    Raises:
        TrainingError: it cannot be read, or belongs to another run.
    """
    content = checkpoint.load_latest(run.out / CHECKPOINTS)
    if content is None:
        return
    if content["digest"] != run.digest:
        raise TrainingError(
            f"{run.out} holds a run with different settings or data; name another --out folder.",
            code="other-run",
        )
    run.module.network.load_state_dict(content["student"])
    run.method.load_state_dict(content["method"])
    run.optimizer.load_state_dict(content["optimizer"])
    run.scaler.load_state_dict(content["scaler"])
    if run.average is not None:
        run.average.module.load_state_dict(content["average"])
    run.step, run.best_top1 = int(content["step"]), float(content["best_top1"])
    run.pending_eval_epoch = content.get("pending_eval_epoch")
    log.info("resuming at step %d of %d", run.step, run.steps)


def export(run: Run, name: str) -> Path:
    """Write the student's weights, in the first process."""
    file = run.out / name
    if run.rank.main:
        facts = students.export_facts(run.settings, run.student, run.class_names)
        checkpoint.write_atomically(
            file,
            lambda partial: weight_files.write_export(partial, run.eval_network.network, facts),
        )
    return file
