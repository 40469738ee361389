"""The training loop: steps, metrics, evaluations and checkpoints.

Targets come with the batch; a teacher runs only if the method needs a live one.
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
from fkdpipe.common.progress import Advance, keeping
from fkdpipe.networks import weight_files
from fkdpipe.train import checkpoint, exclusive, parallel
from fkdpipe.train.batch import Batch, with_next
from fkdpipe.train.evaluate import Accuracy, accuracy, log_failed
from fkdpipe.train.metrics import Meter, MetricsLog, last_evaluation
from fkdpipe.train.state import CHECKPOINTS, Run, export, resume, save
from fkdpipe.train.step import step

log = logging.getLogger(__name__)

# How often processes agree on whether to stop: preemption gives a notice of about 30 s.
POLL_SECONDS = 2.0
POLL_STEPS = 100  # upper limit, in case steps become slower

# One Ctrl-C reaches a process of torchrun twice: from the terminal, and passed on by torchrun.
SAME_SIGNAL_SECONDS = 0.5


@dataclass(frozen=True)
class Result:
    """Result of a run. top1, top5: percent on the validation images; None without any."""

    steps: int
    epochs: int
    top1: float | None
    top5: float | None
    best_top1: float | None
    student: Path
    failed: dict[str, str] = field(default_factory=dict)


def train(run: Run) -> Result:
    """Train to the end, resuming from the run folder's newest checkpoint.

    Raises:
        TrainingError: another process is writing the run folder, the loss is not finite, the
            checkpoint cannot be read, or SIGTERM or Ctrl-C arrived, after which a checkpoint is
            written.
        KeyboardInterrupt: a second Ctrl-C; says which step the newest checkpoint has.
    """
    with exclusive.hold(run.out) if run.rank.main else contextlib.nullcontext():
        return _train(run)


def _train(run: Run) -> Result:
    resume(run)
    run.wrapped = parallel.wrap(run.learner, run.settings, run.rank, run.device)
    metrics = _metrics(run)
    meter = Meter(run.device)
    task = run.reporter.task("train", run.steps, "steps", done=run.step)
    with keeping(lambda: _kept(run)), task as advance, _stop_on_signals() as stop:
        if run.pending_eval_epoch is not None:
            _run_evaluation(run, metrics, stop)
            save(run)
        for batch, following in with_next(_timed(run.crops.stream(run.step), meter)):
            _train_step(run, batch, meter)
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
        run.last = _last_recorded(run)
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


def _kept(run: Run) -> str:
    """The newest checkpoint, for the message of an interrupted run."""
    newest = checkpoint.newest_step(run.out / CHECKPOINTS)
    if newest is None:
        return f"at step {run.step} of {run.steps}; there is no checkpoint, so nothing is kept."
    return (
        f"at step {run.step} of {run.steps}; the checkpoint of step {newest} is kept, and the same "
        "command resumes from it."
    )


def _last_recorded(run: Run) -> Accuracy | None:
    line = last_evaluation(run.out / "metrics.jsonl")
    return Accuracy(*(line[k] for k in ("top1", "top5", "images", "skipped"))) if line else None


def _train_step(run: Run, batch: Batch, meter: Meter) -> None:
    loss, right = step(run, batch)
    meter.add(loss, right, crops=batch.total, images=batch.total // batch.m, seen=len(batch))
    if run.device.type == "cpu":  # on a GPU, this check would synchronise every step
        _check_finite(run, meter)
    run.step += 1


def _check_finite(run: Run, meter: Meter) -> None:
    value = float(meter.loss)
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss is {value} at step {run.step}. The last checkpoint is in "
            f"{run.out / CHECKPOINTS}; try a smaller learning rate or float32.",
            code="loss",
        )


def _save(run: Run, meter: Meter) -> None:
    _check_finite(run, meter)
    save(run)


def _save_and_stop(run: Run) -> NoReturn:
    save(run)
    raise TrainingError(
        f"stopped at step {run.step} of {run.steps}; a checkpoint is written; the same "
        "command resumes from it.",
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
        run.pending_eval_epoch = epoch
        _run_evaluation(run, metrics, stop)
    _save(run, meter)


def _run_evaluation(run: Run, metrics: MetricsLog | None, stop: _Stop) -> None:
    """Run the pending evaluation. If SIGTERM interrupts it, the resumed run repeats it first."""
    run.last = _evaluate(run, stop)
    if run.last is None:
        _save_and_stop(run)
    if metrics is not None:
        line = {
            "kind": "eval",
            "step": run.step,
            "epoch": run.pending_eval_epoch,
            **asdict(run.last),
        }
        del line["failed"]  # of one process only
        metrics.write(line)
    run.pending_eval_epoch = None
    if run.last.top1 > run.best_top1:
        run.best_top1 = run.last.top1
        export(run, "best.safetensors")


def _evaluate(run: Run, stop: _Stop) -> Accuracy | None:
    """Validation accuracy, the images shared among the processes; None if one received SIGTERM."""
    assert run.validation is not None
    share = run.validation.take(np.arange(run.rank.index, len(run.validation), run.rank.world))
    counts = [0.0, 0.0, 0.0, 0.0]
    if len(share):
        local = accuracy(
            run.eval_network,
            run.student.preprocessing,
            share,
            device=run.device,
            precision=run.precision,
            threads=run.feed.threads,
            allow_none=run.rank.world > 1,
            stopping=stop.requested.is_set,
        )
        if run.last is None:  # once per start
            log_failed(local)
        counts = [local.top1 * local.images, local.top5 * local.images, local.images, local.skipped]
    stopped = float(stop.requested.is_set())
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
    """Request to stop, read between steps so that no step is interrupted. SIGTERM (preemptible
    machines) and the first Ctrl-C make it; a second Ctrl-C ends the run at once."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._asked = 0.0
        self._since, self._step, self._next = time.perf_counter(), 0, 0

    def receive(self, number: int, frame: object) -> None:
        """Handle SIGTERM or SIGINT."""
        now = time.monotonic()
        if not self.requested.is_set():
            self._asked = now
            self.requested.set()
            if number == signal.SIGINT:
                log.warning("stopping with a checkpoint; Ctrl-C again ends at once, without one")
        elif number == signal.SIGINT and now - self._asked > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def now(self, run: Run) -> bool:
        """Whether any process should stop. All processes poll at the same step, which follows
        from shared timings, and get the same answer."""
        if run.rank.world == 1:
            return self.requested.is_set()
        if run.step < self._next:
            return False
        now, steps = time.perf_counter(), max(1, run.step - self._step)
        status = [float(self.requested.is_set()), (now - self._since) / steps]
        requests, seconds = parallel.total(status, run.rank, run.device).tolist()
        ahead = POLL_SECONDS * run.rank.world / max(seconds, 1e-6)
        self._since, self._step = now, run.step
        self._next = run.step + int(min(max(ahead, 1), POLL_STEPS))
        return bool(requests)


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[_Stop]:
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {n: signal.signal(n, stop.receive) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _timed(batches: Iterator[Batch], meter: Meter) -> Iterator[Batch]:
    """Count the seconds spent waiting for batches."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        meter.waited += time.perf_counter() - start
        if batch is None:
            return
        yield batch
