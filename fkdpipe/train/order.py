"""The order of images and crops over a run, a function of (seed, step) only.

Every pass permutes the units, groups them into windows, and permutes the images of each window.
This approximates a full shuffle, while wide labels are read one window at a time. Passes of equal m
form one stream of images, which is divided into steps without a short batch between passes; where m
changes, a batch may be short, but never a single crop, of which BatchNorm has no variance. A run
can resume at any step with exactly the next batch, and the batches do not depend on the number of
processes.

In independent mode, for methods that need independent samples, B images are decoded once and their
m crops go to m consecutive batches, crop k of every image to batch k. No batch holds an image
twice. The images of a pass are divided into equal blocks of at most B, so no batch is much shorter
than the others; passes do not share a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fkdpipe.common.errors import UsageError
from fkdpipe.pixels import crops
from fkdpipe.train.schedule import Pass, Stage


@dataclass(frozen=True)
class Window:
    """Consecutive units of a pass whose images are shuffled together."""

    passed: Pass
    index: int
    units: tuple[int, ...]
    rows: np.ndarray

    @property
    def key(self) -> tuple[int, int]:
        """Sorting key: the order in which windows are read."""
        return self.passed.index, self.index


@dataclass(frozen=True)
class Piece:
    """The images of a batch that come from one window, in order."""

    window: Window
    rows: np.ndarray


@dataclass(frozen=True)
class Step:
    """Images that are decoded together, for one optimiser step, or for m in independent mode.

    Attributes:
        index: index of its (first) optimiser step in the run. passed: the pass it begins in,
            which determines the learning rate.
        pieces: images of the whole (global) batch. images: their number.
        full: number of images of a full batch.
        batches: number of optimiser steps: 1, or m in independent mode.
    """

    index: int
    passed: Pass
    pieces: tuple[Piece, ...]
    full: int
    batches: int = 1

    @property
    def images(self) -> int:
        return sum(len(piece.rows) for piece in self.pieces)

    @property
    def least(self) -> int:
        """Number of images that give a batch of at least two crops."""
        return 2 if self.batches == self.passed.m else 1

    def take(self, begin: int, end: int) -> tuple[Piece, ...]:
        """The images `begin` to `end` of the batch."""
        pieces = []
        at = 0
        for piece in self.pieces:
            rows = piece.rows[max(0, begin - at) : max(0, end - at)]
            at += len(piece.rows)
            if len(rows):
                pieces.append(Piece(piece.window, rows))
        return tuple(pieces)


class Order:
    """The order of a run; see the module.

    Args:
        rows: rows to train on. batch_size: B, in crops.
        independent: never put two crops of an image in one batch.
    """

    def __init__(
        self,
        rows: np.ndarray,
        *,
        unit_size: int,
        window: int,
        stages: Sequence[Stage],
        batch_size: int,
        seed: int,
        independent: bool = False,
    ) -> None:
        for stage in stages:
            if batch_size % stage.first.m:
                raise UsageError(
                    f"batch size {batch_size} is not a multiple of {stage.first.m} crops."
                )
        self._rows = np.sort(rows)
        self._units, starts = np.unique(self._rows // unit_size, return_index=True)
        self._of_unit = dict(
            zip(self._units.tolist(), np.split(self._rows, starts[1:]), strict=True)
        )
        self._window, self._batch_size, self._seed = window, batch_size, seed
        self._windows = -(-len(self._units) // window)
        self._stages, self.independent = tuple(stages), independent
        least = min(2, batch_size)
        self._blocks = _batches_of(len(self._rows), batch_size, least)  # of an independent pass
        self._units_of = lru_cache(maxsize=2)(self._permuted_units)

    def __len__(self) -> int:
        """Number of optimiser steps in the run."""
        return sum(self._cuts(stage) * self._batches(stage) for stage in self._stages)

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Steps starting at `start`; in independent mode, at the block that contains it."""
        offset = 0
        for stage in self._stages:
            batches = self._batches(stage)
            count = self._cuts(stage) * batches
            if start < offset + count:
                yield from self._run(stage, offset, max(0, start - offset) // batches)
            offset += count

    def first_step(self, pass_index: int) -> int:
        """The first step that begins in this pass, or after it if none does."""
        offset = 0
        for stage in self._stages:
            number = min(pass_index - stage.first.index, stage.count)
            if number < stage.count:
                return offset + self._first_cut(stage, number) * self._batches(stage)
            offset += self._cuts(stage) * self._batches(stage)
        return offset

    def pass_of(self, step: int) -> int:
        """The pass that a step begins in."""
        offset = 0
        for stage in self._stages:
            batches = self._batches(stage)
            count = self._cuts(stage) * batches
            if step < offset + count:
                begin = self._cut(stage, (step - offset) // batches)
                return stage.first.index + begin // len(self._rows)
            offset += count
        last = self._stages[-1]
        return last.first.index + last.count

    def windows(self, passed: Pass) -> list[Window]:
        """The windows of a pass, in order. Their rows are a permutation of all rows."""
        return [self.window(passed, index) for index in range(self._windows)]

    def window(self, passed: Pass, index: int) -> Window:
        """One window of a pass, computed alone, so that no pass begins with a delay."""
        seed = crops.derive_seed(self._seed, passed.index)
        units = self._units_of(seed)[index * self._window : (index + 1) * self._window].tolist()
        rows = np.concatenate([self._of_unit[unit] for unit in units])
        return Window(passed, index, tuple(units), rows[crops.random_order(seed + 1, rows)])

    def following(self, window: Window) -> Window | None:
        """The window after this one, in this pass or the next; None after the last."""
        if window.index + 1 < self._windows:
            return self.window(window.passed, window.index + 1)
        after = window.passed.index + 1
        for stage in self._stages:
            if 0 <= after - stage.first.index < stage.count:
                return self.window(stage.passed(after - stage.first.index), 0)
        return None

    def _permuted_units(self, seed: int) -> np.ndarray:
        return self._units[crops.random_order(seed, self._units)]

    def _batches(self, stage: Stage) -> int:
        return stage.first.m if self.independent else 1

    def _cuts(self, stage: Stage) -> int:
        """Number of pieces that the stream of a stage is divided into."""
        if self.independent:
            return self._blocks * stage.count
        return _batches_of(len(self._rows) * stage.count, self._full(stage), self._least(stage))

    def _cut(self, stage: Stage, number: int) -> int:
        """Start of piece `number` in the stream of a stage, in images."""
        count = len(self._rows)
        if self.independent:
            passes, block = divmod(number, self._blocks)
            return passes * count + count * block // self._blocks
        if number >= self._cuts(stage):
            return count * stage.count
        # A last image alone takes its neighbour out of the full batch before it.
        return min(number * self._full(stage), max(0, count * stage.count - self._least(stage)))

    def _first_cut(self, stage: Stage, number: int) -> int:
        """The first piece that begins in or after pass `number` of the stage."""
        if self.independent:
            return number * self._blocks
        begin = number * len(self._rows)
        first = -(-begin // self._full(stage))
        return first if self._cut(stage, first) >= begin else first + 1

    def _full(self, stage: Stage) -> int:
        """Number of images of a full batch."""
        return self._batch_size if self.independent else self._batch_size // stage.first.m

    def _least(self, stage: Stage) -> int:
        """Number of images that give two crops, if a full batch has as many."""
        return min(2, self._full(stage)) if stage.first.m == 1 else 1

    def _run(self, stage: Stage, offset: int, skip: int) -> Iterator[Step]:
        """The steps of a stage, starting at its piece `skip`; its first step has index `offset`."""
        batches = self._batches(stage)
        stream = self._stream(stage, self._cut(stage, skip))
        rest = next(stream)
        for number in range(skip, self._cuts(stage)):
            left = self._cut(stage, number + 1) - self._cut(stage, number)
            pieces = []
            while left:
                if not len(rest.rows):
                    rest = next(stream)
                pieces.append(Piece(rest.window, rest.rows[:left]))
                rest = Piece(rest.window, rest.rows[left:])
                left -= len(pieces[-1].rows)
            index, passed = offset + number * batches, pieces[0].window.passed
            yield Step(index, passed, tuple(pieces), self._full(stage), batches)

    def _stream(self, stage: Stage, begin: int) -> Iterator[Piece]:
        """The images of a stage, window by window, starting at image `begin`."""
        first, skip = divmod(begin, len(self._rows))
        for number in range(first, stage.count):
            for index in range(self._windows):
                window = self.window(stage.passed(number), index)
                if skip < len(window.rows):
                    yield Piece(window, window.rows[skip:])
                skip = max(0, skip - len(window.rows))


def share(step: Step, rank: int, world: int, block: int = 1) -> tuple[int, tuple[Piece, ...]]:
    """The start and the images of one process's contiguous share of a step.

    A share consists of whole blocks of `block` images (the last may be shorter). Shares differ by
    at most one block, unless a process would get a single crop although a full batch has more for
    each: then fewer processes share the step.
    """
    bounds = _bounds(step.images, -(-step.images // block), world, block)
    if step.full >= step.least * world and _smallest(bounds) < step.least:
        block = max(block, step.least)
        bounds = _bounds(step.images, max(1, step.images // block), world, block)
    begin, end = bounds[rank], bounds[rank + 1]
    return begin, step.take(begin, end)


def _bounds(images: int, blocks: int, world: int, block: int) -> list[int]:
    """Where the shares of the processes begin; the last block ends with the last image."""
    return [min(images, blocks * rank // world * block) for rank in range(world)] + [images]


def _smallest(bounds: list[int]) -> int:
    """The size of the smallest share that is not empty."""
    return min(end - begin for begin, end in itertools.pairwise(bounds) if end > begin)


def _batches_of(images: int, full: int, least: int) -> int:
    """Number of batches of at most `full` images, or one more where one would be below `least`."""
    return max(1, min(-(-images // full), images // least))
