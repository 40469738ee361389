"""The order of images and crops over a run, as a function of (seed, step) alone.

For every pass the units are permuted, taken a window at a time, and the images of a window are
permuted: near enough to a full shuffle, while wide labels are read a window at a time. Passes of
the same m are one stream of images, which is cut into steps without a short batch between passes;
where m changes a batch may end short. A run that stops goes on at any step with the very next
batch, and any number of processes sees the same batches.

Independent, for methods that ask for independent samples: B images are decoded once, and their m
crops go to m batches that follow one another, crop k of every image to batch k. No batch holds an
image twice. The images of a pass are cut into equal blocks of at most B, so no batch is much
shorter than the others; passes do not share a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fkdpipe.common.errors import UsageError
from fkdpipe.pixels import crops
from fkdpipe.train.schedule import Pass, Stage


@dataclass(frozen=True)
class Window:
    """A run of units whose images are shuffled together, within one pass."""

    passed: Pass
    index: int
    units: tuple[int, ...]
    rows: np.ndarray

    @property
    def key(self) -> tuple[int, int]:
        """Windows are read in the order of their keys."""
        return self.passed.index, self.index


@dataclass(frozen=True)
class Piece:
    """Images of one batch that come from one window, in order."""

    window: Window
    rows: np.ndarray


@dataclass(frozen=True)
class Step:
    """Images that are decoded together: those of one optimiser step, or of m when independent.

    Attributes:
        index: number in the run of the (first) optimiser step. passed: the pass it begins in,
            which sets its learning rate.
        pieces: images of the whole (global) batch. images: how many those are.
        batches: optimiser steps it is for: 1, or m when independent.
    """

    index: int
    passed: Pass
    pieces: tuple[Piece, ...]
    batches: int = 1

    @property
    def images(self) -> int:
        return sum(len(piece.rows) for piece in self.pieces)


class Order:
    """See the module. `rows` are the usable rows; B is `batch_size` in crops.

    independent: no two crops of an image in one batch.
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
                    f"batch size {batch_size} is no multiple of {stage.first.m} crops."
                )
        self._rows = np.sort(rows)
        self._units, starts = np.unique(self._rows // unit_size, return_index=True)
        self._of_unit = dict(
            zip(self._units.tolist(), np.split(self._rows, starts[1:]), strict=True)
        )
        self._window, self._batch_size, self._seed = window, batch_size, seed
        self._windows = -(-len(self._units) // window)
        self._stages, self.independent = tuple(stages), independent
        self._blocks = -(-len(self._rows) // batch_size)  # of a pass, when independent
        self._units_of = lru_cache(maxsize=2)(self._permuted_units)

    def __len__(self) -> int:
        """Optimiser steps of the run."""
        return sum(self._cuts(stage) * self._batches(stage) for stage in self._stages)

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Steps from number `start` on; when independent, from the block that holds it."""
        begun = 0
        for stage in self._stages:
            batches = self._batches(stage)
            count = self._cuts(stage) * batches
            if start < begun + count:
                yield from self._run(stage, begun, max(0, start - begun) // batches)
            begun += count

    def first_step(self, pass_index: int) -> int:
        """The first step that begins in this pass or, where none does, after it."""
        begun = 0
        for stage in self._stages:
            number = min(pass_index - stage.first.index, stage.count)
            if number < stage.count:
                return begun + self._first_cut(stage, number) * self._batches(stage)
            begun += self._cuts(stage) * self._batches(stage)
        return begun

    def pass_of(self, step: int) -> int:
        """The pass that a step begins in."""
        begun = 0
        for stage in self._stages:
            batches = self._batches(stage)
            count = self._cuts(stage) * batches
            if step < begun + count:
                begin = self._cut(stage, (step - begun) // batches)
                return stage.first.index + begin // len(self._rows)
            begun += count
        last = self._stages[-1]
        return last.first.index + last.count

    def windows(self, passed: Pass) -> list[Window]:
        """The windows of a pass, in order; their rows are a permutation of all rows."""
        return [self.window(passed, index) for index in range(self._windows)]

    def window(self, passed: Pass, index: int) -> Window:
        """One window of a pass, made without the others: no pass begins with a pause."""
        seed = crops.derive_seed(self._seed, passed.index)
        units = self._units_of(seed)[index * self._window : (index + 1) * self._window].tolist()
        rows = np.concatenate([self._of_unit[unit] for unit in units])
        return Window(passed, index, tuple(units), rows[crops.random_order(seed + 1, rows)])

    def following(self, window: Window) -> Window | None:
        """The window read after this one, in this pass or as the first of the next."""
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
        """Into how many pieces the stream of a stage is cut."""
        if self.independent:
            return self._blocks * stage.count
        return -(-len(self._rows) * stage.count // (self._batch_size // stage.first.m))

    def _cut(self, stage: Stage, number: int) -> int:
        """Where in the stream of a stage, counted in images, piece `number` begins."""
        count = len(self._rows)
        if self.independent:
            passes, block = divmod(number, self._blocks)
            return passes * count + count * block // self._blocks
        return min(number * (self._batch_size // stage.first.m), count * stage.count)

    def _first_cut(self, stage: Stage, number: int) -> int:
        """The first piece that begins in pass `number` of the stage, or after it."""
        if self.independent:
            return number * self._blocks
        return -(-number * len(self._rows) // (self._batch_size // stage.first.m))

    def _run(self, stage: Stage, begun: int, skip: int) -> Iterator[Step]:
        """The steps of a stage, from its piece `skip` on; its first step is number `begun`."""
        batches = self._batches(stage)
        coming = self._stream(stage, self._cut(stage, skip))
        rest = next(coming)
        for number in range(skip, self._cuts(stage)):
            left = self._cut(stage, number + 1) - self._cut(stage, number)
            pieces = []
            while left:
                if not len(rest.rows):
                    rest = next(coming)
                pieces.append(Piece(rest.window, rest.rows[:left]))
                rest = Piece(rest.window, rest.rows[left:])
                left -= len(pieces[-1].rows)
            yield Step(begun + number * batches, pieces[0].window.passed, tuple(pieces), batches)

    def _stream(self, stage: Stage, begin: int) -> Iterator[Piece]:
        """The images of a stage, window after window, from image number `begin` on."""
        first, skip = divmod(begin, len(self._rows))
        for number in range(first, stage.count):
            for index in range(self._windows):
                window = self.window(stage.passed(number), index)
                if skip < len(window.rows):
                    yield Piece(window, window.rows[skip:])
                skip = max(0, skip - len(window.rows))


def share(step: Step, rank: int, world: int, block: int = 1) -> tuple[int, tuple[Piece, ...]]:
    """The contiguous run of a step's images that one process takes, and where it begins.

    Runs are whole blocks of `block` images, counted from the step's first image (the last one may
    be shorter), and differ by one block at most.
    """
    blocks = -(-step.images // block)
    begin, end = (min(step.images, blocks * r // world * block) for r in (rank, rank + 1))
    taken = []
    at = 0
    for piece in step.pieces:
        rows = piece.rows[max(0, begin - at) : max(0, end - at)]
        at += len(piece.rows)
        if len(rows):
            taken.append(Piece(piece.window, rows))
    return begin, tuple(taken)
