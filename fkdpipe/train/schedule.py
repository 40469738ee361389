"""Passes over the images, and their learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fkdpipe.train.settings import OptimizerSettings, ScheduleSettings


@dataclass(frozen=True)
class Pass:
    """One pass over all images.

    Attributes:
        index: index of the pass. epoch: epochs completed before it.
        m: crops per image in this pass. first_crop: crops per image used before it.
    """

    index: int
    epoch: int
    m: int
    first_crop: int


@dataclass(frozen=True)
class Stage:
    """Consecutive passes of equal m.

    Attributes:
        first: the first pass. count: number of passes.
    """

    first: Pass
    count: int

    def passed(self, number: int) -> Pass:
        """Pass `number` of the stage."""
        crops = number * self.first.m
        return Pass(
            index=self.first.index + number,
            epoch=self.first.epoch + crops,
            m=self.first.m,
            first_crop=self.first.first_crop + crops,
        )


def stages(
    epochs: int, m: int, *, single_first: int = 0, single_last: int = 0
) -> tuple[Stage, ...]:
    """The passes of a run: m crops each, with optional single-crop epochs at both ends.

    If m does not divide the number of epochs, the remaining ones use single crops at the end.
    """
    middle = epochs - single_first - single_last
    widths = [(1, single_first), (m, middle // m), (1, middle % m + single_last)]
    result: list[Stage] = []
    index = epoch = 0
    for width, count in widths:
        if result and width == result[-1].first.m:
            result[-1] = Stage(result[-1].first, result[-1].count + count)
        elif count:
            result.append(Stage(Pass(index, epoch, width, epoch), count))
        index, epoch = index + count, epoch + width * count
    return tuple(result)


def learning_rate(
    schedule: ScheduleSettings, optimizer: OptimizerSettings, *, epoch: int, epochs: int
) -> float:
    """The learning rate of a pass that begins after `epoch` epochs, as in timm's schedulers."""
    base = optimizer.lr
    if epoch < schedule.warmup_epochs:
        slope = (base - schedule.warmup_lr) / schedule.warmup_epochs
        return schedule.warmup_lr + epoch * slope
    if schedule.name == "constant":
        return base
    if schedule.name == "step":
        return base * schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
    done = epoch / epochs
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return schedule.min_lr + (base - schedule.min_lr) * share
