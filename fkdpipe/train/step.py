"""One optimiser step: what a batch is to be, forward, backward, update."""

from __future__ import annotations

import torch

from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.networks.models import Preprocessing
from fkdpipe.networks.teachers import autocast
from fkdpipe.pixels import colour, crops
from fkdpipe.pixels.replay import normalise
from fkdpipe.train import mixing, parallel, stored, targets
from fkdpipe.train.feed import Batch
from fkdpipe.train.methods.interface import Targets
from fkdpipe.train.mixing import Mix
from fkdpipe.train.schedule import learning_rate
from fkdpipe.train.state import Run


def step(run: Run, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Train on a batch.

    Returns:
        (this process's share of the step's mean loss, how many of its crops are right), both
        scalars on the device: nothing here waits for it.
    """
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
    pixels, wanted = prepare(run, batch)
    run.optimizer.zero_grad(set_to_none=True)
    share = torch.zeros((), device=run.device)
    right = torch.zeros((), dtype=torch.int64, device=run.device)
    class_B = batch.class_B.to(run.device, non_blocking=True)
    parts = torch.arange(len(pixels)).tensor_split(min(settings.accumulate, len(pixels)))
    for number, part in enumerate(parts):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        with parallel.quiet(run.wrapped, last=number == len(parts) - 1):
            with autocast(run.precision, run.device):
                logits_BC, terms = run.wrapped(pixels[rows], wanted.take(rows))
            losses = [reduce(term, batch.total, len(part)) for term in terms.values()]
            loss = torch.stack(losses).sum()
            # DDP averages gradients over processes; shares of a mean are to be added up.
            run.scaler.scale(loss * run.rank.world).backward()
        share += loss.detach()
        right += (logits_BC.detach().argmax(1) == class_B[rows]).sum()
    _update(run)
    return share, right


def _update(run: Run) -> None:
    if run.settings.optimizer.clip_norm is not None:
        run.scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(
            run.learner.parameters(), run.settings.optimizer.clip_norm, error_if_nonfinite=False
        )
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.average is not None:
        run.average.update(run.module)


def reduce(term: torch.Tensor, total: int, ours: int) -> torch.Tensor:
    """A loss term as a share of the step's mean: (B,) values, or a scalar over `ours` crops.

    Args:
        total: crops of the step over all processes; 0 for one that only goes along.
    """
    weight = 1.0 / total if total else 0.0
    return term.sum() * weight if term.dim() else term * (ours * weight)


def prepare(run: Run, batch: Batch) -> tuple[torch.Tensor, Targets]:
    """Normalised pixels of the student's view, mixed where asked, and what they are to be."""
    classes = run.student.classes
    truth_BC = targets.dense(None, run.target, classes, batch.class_B, run.device)
    prob_BC = truth_BC
    if batch.labels is not None:
        width = run.feed.data.labels.classes if run.feed.data.labels else classes
        prob_BC = targets.dense(batch.labels, run.target, width, batch.class_B, run.device)
    mix = _mix(run, batch)
    pixels = _pixels(run, batch, batch.pixels, run.student.preprocessing, mix)
    if mix is not None:
        size = (pixels.shape[2], pixels.shape[3])
        truth_BC, prob_BC = (mixing.mix_targets(mix, p, size) for p in (truth_BC, prob_BC))
    return pixels, Targets(
        prob_BC=prob_BC,
        truth_BC=truth_BC,
        teacher=_teacher_side(run, batch, mix),
        epoch=batch.passed.epoch,
        stored=batch.labels is not None,
    )


def _pixels(
    run: Run, batch: Batch, view: torch.Tensor, p: Preprocessing, mix: Mix | None
) -> torch.Tensor:
    seen = colour.jitter(view.to(run.device, non_blocking=True), batch.jitter_B4)
    pixels = normalise(seen, p.mean, p.std)
    return pixels if mix is None else mixing.mix_pixels(mix, pixels)


def _mix(run: Run, batch: Batch) -> Mix | None:
    if not run.settings.mixing.on:
        return None
    drawn = mixing.draw(
        run.settings.mixing,
        seed=run.settings.seed,
        step=batch.step,
        first_image=batch.first_image,
        images=len(batch.class_B) // batch.m,
        m=batch.m,
    )
    return drawn.to(run.device)


def _teacher_side(run: Run, batch: Batch, mix: Mix | None) -> Outputs | None:
    """What the live teacher says of the (mixed) batch, or what the store has kept of it."""
    if run.teacher is not None:
        p = run.teacher.preprocessing
        return run.teacher.outputs(_pixels(run, batch, batch.views[-1], p, mix))
    if batch.features is not None:
        assert run.feed.data.features is not None
        features = batch.features.to(run.device, non_blocking=True)
        return stored.stored_outputs(features, run.feed.data.features.settings)
    return None
