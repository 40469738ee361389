"""The training loop: batches in, steps, metrics, evaluations, checkpoints.

No teacher here unless a method asks for a live one: what the student learns comes with the batch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fkdpipe.common.errors import TrainingError
from fkdpipe.common.progress import Advance
from fkdpipe.networks import weight_files
from fkdpipe.train import parallel
from fkdpipe.train.batch import Batch, with_next
from fkdpipe.train.evaluate import Accuracy, accuracy
from fkdpipe.train.metrics import Meter, MetricsLog, last_evaluation
from fkdpipe.train.state import CHECKPOINTS, Run, export, resume, save
from fkdpipe.train.step import step

log = logging.getLogger(__name__)

# Several processes ask each other about stopping this often: a preempted machine gives 30 s or so.
ASK_SECONDS = 2.0
ASK_STEPS = 100  # at most, should steps become slower


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
        TrainingError: the loss is not finite, the checkpoint cannot be read, or SIGTERM came; a
            checkpoint is written then.
    """
    resume(run)
    run.wrapped = parallel.wrap(run.learner, run.settings, run.rank, run.device)
    metrics = _metrics(run)
    meter = Meter(run.device)
    task = run.reporter.task("train", run.steps, "steps", done=run.step)
    with task as advance, _stop_asked() as stop:
        if run.owed is not None:
            _judge(run, metrics, stop)
            save(run)
        for batch, following in with_next(_timed(run.crops.stream(run.step), meter)):
            _one(run, batch, meter)
            _log_step(run, batch, meter, metrics, advance)
            if following is None or following.passed.index != batch.passed.index:
                _end_of_pass(run, batch, meter, metrics, stop, last=following is None)
            elif run.settings.checkpoint_every and run.step % run.settings.checkpoint_every == 0:
                _save(run, meter)
            if following is not None and stop.now(run):
                _check_finite(run, meter)
                _save_and_stop(run)
    file = export(run, weight_files.EXPORT_NAME)
    if run.last is None:  # finished before this start
        run.last = _recorded(run)
    if metrics is not None:
        metrics.close()
    return Result(
        steps=run.step,
        epochs=run.settings.epochs,
        top1=run.last.top1 if run.last else None,
        top5=run.last.top5 if run.last else None,
        best_top1=run.best_top1 if run.last else None,
        student=file,
        failed=dict(run.feed.failed),
    )


def _recorded(run: Run) -> Accuracy | None:
    line = last_evaluation(run.out / "metrics.jsonl")
    return Accuracy(*(line[k] for k in ("top1", "top5", "images", "skipped"))) if line else None


def _one(run: Run, batch: Batch, meter: Meter) -> None:
    loss, right = step(run, batch)
    meter.add(loss, right, crops=batch.total, images=batch.total // batch.m, seen=len(batch))
    if run.device.type == "cpu":  # on a GPU, asking every step would make it wait for the device
        _check_finite(run, meter)
    run.step += 1


def _check_finite(run: Run, meter: Meter) -> None:
    value = float(meter.loss)
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss is {value} at step {run.step}. The last good checkpoint is kept in "
            f"{run.out / CHECKPOINTS}; try a smaller learning rate or float32.",
            code="loss",
        )


def _save(run: Run, meter: Meter) -> None:
    _check_finite(run, meter)
    save(run)


def _save_and_stop(run: Run) -> NoReturn:
    save(run)
    raise TrainingError(
        f"stopped at step {run.step} of {run.steps}; a checkpoint is written and the same "
        "command goes on from it.",
        code="stopped",
    )


def _end_of_pass(
    run: Run, batch: Batch, meter: Meter, metrics: MetricsLog | None, stop: _Stop, *, last: bool
) -> None:
    epoch = batch.passed.epoch + batch.passed.m
    every = run.settings.eval_every
    due = last or epoch // every > batch.passed.epoch // every
    if due and run.validation is not None:
        _check_finite(run, meter)
        run.owed = epoch
        _judge(run, metrics, stop)
    _save(run, meter)


def _judge(run: Run, metrics: MetricsLog | None, stop: _Stop) -> None:
    """The evaluation that is owed. SIGTERM cuts it short; the run that goes on begins with it."""
    run.last = _evaluate(run, stop)
    if run.last is None:
        _save_and_stop(run)
    if metrics is not None:
        line = {"kind": "eval", "step": run.step, "epoch": run.owed, **asdict(run.last)}
        metrics.write(line)
    run.owed = None
    if run.last.top1 > run.best_top1:
        run.best_top1 = run.last.top1
        export(run, "best.safetensors")


def _evaluate(run: Run, stop: _Stop) -> Accuracy | None:
    """Accuracy on the held-out images, each process taking its share of them; None when one of
    them was asked to stop."""
    assert run.validation is not None
    ours = run.validation.take(np.arange(run.rank.index, len(run.validation), run.rank.world))
    counts = [0.0, 0.0, 0.0, 0.0]
    if len(ours):
        made = accuracy(
            run.judged,
            run.student.preprocessing,
            ours,
            device=run.device,
            precision=run.precision,
            threads=run.feed.threads,
            allow_none=run.rank.world > 1,
            stopping=stop.asked.is_set,
        )
        counts = [made.top1 * made.images, made.top5 * made.images, made.images, made.skipped]
    stopped = float(stop.asked.is_set())
    sums = parallel.total([*counts, stopped], run.rank, run.device).tolist()
    top1, top5, seen, skipped, stopping = sums
    if stopping:
        return None
    return Accuracy(top1 / max(seen, 1), top5 / max(seen, 1), int(seen), int(skipped))


def _metrics(run: Run) -> MetricsLog | None:
    if not run.rank.main:
        return None
    return MetricsLog(
        run.out / "metrics.jsonl", resume_step=run.step, tensorboard=run.settings.tensorboard
    )


def _log_step(
    run: Run, batch: Batch, meter: Meter, metrics: MetricsLog | None, advance: Advance
) -> None:
    advance(1)
    if run.step % run.settings.log_every and run.step != run.steps:
        return
    _check_finite(run, meter)
    sums = parallel.total(meter.sums, run.rank, run.device).tolist()
    if metrics is not None:
        line: dict[str, Any] = {"kind": "train", "step": run.step, "epoch": batch.passed.epoch}
        line["lr"] = run.optimizer.param_groups[0]["lr"]
        metrics.write(line | meter.line(sums) | run.method.facts())
    meter.restart()


class _Stop:
    """Whether SIGTERM came, so that a step is never cut in two (preemptible machines)."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._since, self._step, self._next = time.perf_counter(), 0, 0

    def now(self, run: Run) -> bool:
        """Does any process want to stop? All answer alike, at the same step: which step they ask
        each other at follows from times that they share."""
        if run.rank.world == 1:
            return self.asked.is_set()
        if run.step < self._next:
            return False
        now, steps = time.perf_counter(), max(1, run.step - self._step)
        ours = [float(self.asked.is_set()), (now - self._since) / steps]
        asked, seconds = parallel.total(ours, run.rank, run.device).tolist()
        ahead = ASK_SECONDS * run.rank.world / max(seconds, 1e-6)
        self._since, self._step = now, run.step
        self._next = run.step + int(min(max(ahead, 1), ASK_STEPS))
        return bool(asked)


@contextlib.contextmanager
def _stop_asked() -> Iterator[_Stop]:
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.asked.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _timed(batches: Iterator[Batch], meter: Meter) -> Iterator[Batch]:
    """Count the seconds spent waiting for batches."""
    while True:
        begun = time.perf_counter()
        batch = next(batches, None)
        meter.waited += time.perf_counter() - begun
        if batch is None:
            return
        yield batch
