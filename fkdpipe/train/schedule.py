"""Passes over the images, and the learning rate of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fkdpipe.train.settings import OptimizerSettings, ScheduleSettings


@dataclass(frozen=True)
class Pass:
    """One walk over all images.

    Attributes:
        index: number of the pass. epoch: epochs done before it.
        m: crops of every image in this pass. first_crop: how many crops of each image came before.
    """

    index: int
    epoch: int
    m: int
    first_crop: int


@dataclass(frozen=True)
class Stage:
    """Passes of the same m that follow one another.

    Attributes:
        first: the first of them. count: how many.
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
    """The passes of a run: m crops each, single crops at the ends where asked for.

    Epochs that m does not divide are run with single crops, after the others.
    """
    middle = epochs - single_first - single_last
    widths = [(1, single_first), (m, middle // m), (1, middle % m + single_last)]
    found: list[Stage] = []
    index = epoch = 0
    for width, count in widths:
        if found and width == found[-1].first.m:
            found[-1] = Stage(found[-1].first, found[-1].count + count)
        elif count:
            found.append(Stage(Pass(index, epoch, width, epoch), count))
        index, epoch = index + count, epoch + width * count
    return tuple(found)


def learning_rate(
    schedule: ScheduleSettings, optimizer: OptimizerSettings, *, epoch: int, epochs: int
) -> float:
    """The rate of a pass that begins after `epoch` epochs, as timm's schedulers have it."""
    base = optimizer.lr
    if epoch < schedule.warmup_epochs:
        slope = (base - schedule.warmup_lr) / schedule.warmup_epochs
        return schedule.warmup_lr + epoch * slope
    if schedule.name == "constant":
        return base
    if schedule.name == "step":
        return base * schedule.gamma ** sum(epoch >= stone for stone in schedule.milestones)
    done = epoch / epochs
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return schedule.min_lr + (base - schedule.min_lr) * share
