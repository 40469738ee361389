"""One optimiser step: targets, forward, backward, update."""

from __future__ import annotations

import torch

from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.networks.teachers import autocast
from fkdpipe.pixels import crops
from fkdpipe.train import mixing, parallel
from fkdpipe.train.batch import Batch
from fkdpipe.train.methods.interface import Targets
from fkdpipe.train.mixing import Mix
from fkdpipe.train.schedule import learning_rate
from fkdpipe.train.state import Run
from fkdpipe.train.stored import one_hot


def step(run: Run, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Train on a batch.

    Returns:
        (this process's share of the step's mean loss, its number of correct crops), both scalars
        on the device, without synchronisation.
    """
    settings = run.settings
    # Dropout and drop path depend on (seed, step, rank) only, so a resumed run draws the same
    # numbers.
    torch.manual_seed(crops.derive_seed(settings.seed, run.step * run.rank.world + run.rank.index))
    rate = learning_rate(
        settings.schedule, settings.optimizer, epoch=batch.passed.epoch, epochs=settings.epochs
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    run.learner.train()
    pixels, targets = prepare(run, batch)
    run.optimizer.zero_grad(set_to_none=True)
    share = torch.zeros((), device=run.device)
    right = torch.zeros((), dtype=torch.int64, device=run.device)
    parts = torch.arange(len(pixels)).tensor_split(_parts(run, len(pixels)))
    for number, part in enumerate(parts):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        with parallel.quiet(run.wrapped, last=number == len(parts) - 1):
            with autocast(run.precision, run.device):
                logits_BC, terms = run.wrapped(pixels[rows], targets.take(rows))
            losses = [reduce(term, batch.total, len(part)) for term in terms.values()]
            loss = torch.stack(losses).sum()
            # DDP averages gradients over processes; shares of a mean have to be summed.
            run.scaler.scale(loss * run.rank.world).backward()
        share += loss.detach()
        right += (logits_BC.detach().argmax(1) == batch.classes[rows]).sum()
    _update(run)
    return share, right


def _parts(run: Run, crops: int) -> int:
    """Number of parts of a share. BatchNorm has no variance of one crop, so a short share has
    fewer parts, unless those of a full one are single crops already."""
    accumulate = run.settings.accumulate
    least = 2 if run.settings.batch_size >= 2 * accumulate * run.rank.world else 1
    return max(1, min(accumulate, crops // least))


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


def reduce(term: torch.Tensor, total: int, local: int) -> torch.Tensor:
    """A process's share of the step's mean of a loss term.

    Args:
        term: (B,) values, or a scalar mean over `local` crops.
        total: crops of the step over all processes; 0 gives zero weight.
    """
    weight = 1.0 / total if total else 0.0
    return term.sum() * weight if term.dim() else term * (local * weight)


def prepare(run: Run, batch: Batch) -> tuple[torch.Tensor, Targets]:
    """The student's pixels and targets, with mixup and CutMix applied."""
    prob_BC = truth_BC = batch.labels
    from_store = run.feed.data.labels is not None
    if from_store:
        truth_BC = one_hot(batch.classes, run.student.classes)
    pixels, teacher_pixels = batch.pixels, batch.teacher_pixels
    mix = _mix(run, batch)
    if mix is not None:
        size = (pixels.shape[2], pixels.shape[3])
        truth_BC, prob_BC = (mixing.mix_targets(mix, p, size) for p in (truth_BC, prob_BC))
        pixels = mixing.mix_pixels(mix, pixels)
        if teacher_pixels is not None:
            teacher_pixels = mixing.mix_pixels(mix, teacher_pixels)
    return pixels, Targets(
        prob_BC=prob_BC,
        truth_BC=truth_BC,
        teacher=_teacher_side(run, batch, teacher_pixels),
        epoch=batch.passed.epoch,
        stored=from_store,
    )


def _mix(run: Run, batch: Batch) -> Mix | None:
    if not run.settings.mixing.on:
        return None
    mix = mixing.draw(
        run.settings.mixing,
        seed=run.settings.seed,
        step=batch.step,
        first_image=batch.first_image,
        images=len(batch) // batch.m,
        m=batch.m,
    )
    return mix.to(run.device)


def _teacher_side(run: Run, batch: Batch, pixels: torch.Tensor | None) -> Outputs | None:
    """Outputs of the live teacher for the (mixed) batch, or stored features."""
    if run.teacher is not None:
        assert pixels is not None
        return run.teacher.outputs(pixels)
    if batch.features is not None:
        assert run.feed.data.features is not None
        return run.feed.data.features.outputs(batch.features)
    return None
