"""The training loop: student, feed and method, step by step.

No teacher here: what the student learns comes with the batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fkdpipe import colour, crops, models
from fkdpipe.distributed import Rank
from fkdpipe.errors import TrainingError
from fkdpipe.images import ImageFolder
from fkdpipe.models import Loaded
from fkdpipe.progress import Advance, Reporter, silent
from fkdpipe.replay import normalise
from fkdpipe.storage.labels import Target
from fkdpipe.taps import Outputs, Tapped
from fkdpipe.teachers import Precision, Teacher, autocast
from fkdpipe.train import checkpoint, inputs, students, targets
from fkdpipe.train.evaluate import Accuracy, evaluate
from fkdpipe.train.feed import Batch, Feed
from fkdpipe.train.learner import Learner
from fkdpipe.train.methods.interface import Method, Targets
from fkdpipe.train.metrics import MetricsLog
from fkdpipe.train.schedule import learning_rate
from fkdpipe.train.settings import TrainSettings

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


@dataclass
class Run:
    """Everything a running training holds.

    step counts optimiser steps that are done. digest names settings and data; a checkpoint of
    another digest is refused.
    """

    settings: TrainSettings
    out: Path
    feed: Feed
    student: Loaded
    learner: Learner
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: Precision
    rank: Rank
    class_names: tuple[str, ...]
    validation: ImageFolder | None
    digest: str
    step: int = 0
    best_top1: float = -1.0
    last: Accuracy | None = None
    reporter: Reporter = silent

    @property
    def target(self) -> Target:
        return self.settings.parsed_target

    @property
    def module(self) -> Tapped:
        """The student with its taps."""
        return self.learner.student

    @property
    def method(self) -> Method:
        return self.learner.method


@dataclass(frozen=True)
class Result:
    """How a run ended. top1, top5: percent on the held-out images, None without any."""

    steps: int
    epochs: int
    top1: float | None
    top5: float | None
    best_top1: float | None
    student: Path
    failed: dict[str, str] = field(default_factory=dict)


def train(run: Run) -> Result:
    """Run to the end, from wherever the run folder says it stopped.

    Raises:
        TrainingError: the loss is not finite, or the checkpoint cannot be read.
    """
    resume(run)
    metrics = MetricsLog(run.out / "metrics.jsonl", resume_step=run.step)
    total = len(run.feed)
    with run.reporter.task("train", total, "steps") as advance:
        advance(run.step)
        meter = _Meter()
        for batch, following in _with_next(_timed(run.feed.run(run.step), meter)):
            loss = step(run, batch, meter)
            run.step += 1
            _log_step(run, batch, loss, meter, metrics, advance)
            if following is None or following.passed.index != batch.passed.index:
                _end_of_pass(run, batch, metrics, last=following is None)
    file = export(run, models.EXPORT_NAME)
    return Result(
        steps=run.step,
        epochs=run.settings.epochs,
        top1=run.last.top1 if run.last else None,
        top5=run.last.top5 if run.last else None,
        best_top1=run.best_top1 if run.last else None,
        student=file,
        failed=dict(run.feed.failed),
    )


def step(run: Run, batch: Batch, meter: _Meter) -> float:
    """One optimiser step; returns the loss, a mean over the crops of the step."""
    settings = run.settings
    # Stateless randomness: dropout and drop path of a step depend on (seed, step, rank) alone, so
    # a run that is stopped and started again draws the same numbers.
    torch.manual_seed(crops.derive_seed(settings.seed, run.step * run.rank.world + run.rank.index))
    rate = learning_rate(
        settings.schedule, settings.optimizer, epoch=batch.passed.epoch, epochs=settings.epochs
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    run.learner.train()
    p = run.student.preprocessing
    pixels = batch.pixels.to(run.device, non_blocking=True)
    pixels = normalise(colour.jitter(pixels, batch.jitter_B4), p.mean, p.std)
    wanted = _targets(run, batch)
    with autocast(run.precision, run.device):
        logits_BC, terms = run.learner(pixels, wanted)
    loss = torch.stack([reduce(term, batch.total, len(batch.class_B)) for term in terms.values()])
    total = loss.sum()
    value = float(total.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss is {value} at step {run.step}. The last good checkpoint is kept in "
            f"{run.out / CHECKPOINTS}; try a smaller learning rate or float32.",
            code="loss",
        )
    run.optimizer.zero_grad(set_to_none=True)
    total.backward()
    run.optimizer.step()
    meter.add(value, logits_BC, batch)
    return value


def _targets(run: Run, batch: Batch) -> Targets:
    classes = run.student.classes
    truth_BC = targets.dense(None, run.target, classes, batch.class_B, run.device)
    prob_BC = truth_BC
    if batch.labels is not None:
        prob_BC = targets.dense(batch.labels, run.target, classes, batch.class_B, run.device)
    return Targets(
        prob_BC=prob_BC,
        truth_BC=truth_BC,
        teacher=_teacher_side(run, batch),
        epoch=batch.passed.epoch,
        stored=batch.labels is not None,
    )


def _teacher_side(run: Run, batch: Batch) -> Outputs | None:
    """What the live teacher says of the batch, or what the store has kept of it."""
    if run.teacher is not None:
        p = run.teacher.preprocessing
        pixels = batch.views[-1].to(run.device, non_blocking=True)
        pixels = colour.jitter(pixels, batch.jitter_B4)
        return run.teacher.outputs(normalise(pixels, p.mean, p.std))
    if batch.features is not None:
        assert run.feed.data.features is not None
        features = batch.features.to(run.device, non_blocking=True)
        return inputs.stored_outputs(features, run.feed.data.features.settings)
    return None


def reduce(term: torch.Tensor, total: int, ours: int) -> torch.Tensor:
    """A loss term as a share of the step's mean: (B,) values, or a scalar over this share."""
    if term.dim():
        return term.sum() / max(total, 1)
    return term * (ours / max(total, 1))


def _end_of_pass(run: Run, batch: Batch, metrics: MetricsLog, *, last: bool) -> None:
    epoch = batch.passed.epoch + batch.passed.m
    every = run.settings.eval_every
    due = last or epoch // every > batch.passed.epoch // every
    if due and run.validation is not None:
        run.last = evaluate(
            run.module,
            run.student.preprocessing,
            run.validation,
            device=run.device,
            precision=run.precision,
            threads=run.feed.threads,
        )
        metrics.write({"kind": "eval", "step": run.step, "epoch": epoch, **asdict(run.last)})
        if run.last.top1 > run.best_top1:
            run.best_top1 = run.last.top1
            export(run, "best.safetensors")
    save(run)


def save(run: Run) -> None:
    content = {
        "step": run.step,
        "digest": run.digest,
        "student": run.module.network.state_dict(),
        "method": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "best_top1": run.best_top1,
    }
    checkpoint.save(run.out / CHECKPOINTS, run.step, content, keep=2)


def resume(run: Run) -> None:
    """Take up the newest checkpoint, if there is one."""
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
    run.step, run.best_top1 = int(content["step"]), float(content["best_top1"])
    log.info("going on from step %d of %d", run.step, len(run.feed))


def export(run: Run, name: str) -> Path:
    """The student alone, as others load it."""
    file = run.out / name
    facts = students.export_facts(run.settings, run.student, run.class_names)
    checkpoint.write_atomically(
        file, lambda partial: models.write_export(partial, run.module.network, facts)
    )
    return file


class _Meter:
    """Means between two lines of metrics."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.begun = time.perf_counter()
        self.waited = 0.0
        self.loss_sum = 0.0
        self.hits = torch.zeros((), dtype=torch.int64)
        self.steps = self.crops = self.images = self.seen = 0

    def add(self, loss: float, logits_BC: torch.Tensor, batch: Batch) -> None:
        self.loss_sum += loss
        self.steps += 1
        self.crops += batch.total
        self.images += batch.total // batch.passed.m
        self.seen += len(batch.class_B)
        with torch.no_grad():
            self.hits = self.hits + (logits_BC.argmax(1).cpu() == batch.class_B).sum()

    def line(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self.begun
        return {
            "loss": self.loss_sum / max(self.steps, 1),
            "train_top1": 100 * float(self.hits) / max(self.seen, 1),
            "images_per_s": self.images / seconds,
            "crops_per_s": self.crops / seconds,
            "wait_share": self.waited / seconds,
        }


def _log_step(
    run: Run, batch: Batch, loss: float, meter: _Meter, metrics: MetricsLog, advance: Advance
) -> None:
    advance(1)
    if run.step % run.settings.log_every and run.step != len(run.feed):
        return
    rate = run.optimizer.param_groups[0]["lr"]
    epoch = batch.passed.epoch
    metrics.write(
        {"kind": "train", "step": run.step, "epoch": epoch, "lr": rate, "last_loss": loss}
        | meter.line()
    )
    meter.restart()


def _timed(batches: Iterator[Batch], meter: _Meter) -> Iterator[Batch]:
    """Count the seconds spent waiting for batches."""
    while True:
        begun = time.perf_counter()
        batch = next(batches, None)
        meter.waited += time.perf_counter() - begun
        if batch is None:
            return
        yield batch


def _with_next(batches: Iterator[Batch]) -> Iterator[tuple[Batch, Batch | None]]:
    """Each batch with the one after it, None at the end."""
    current = next(batches, None)
    while current is not None:
        following = next(batches, None)
        yield current, following
        current = following
