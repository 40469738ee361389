"""The order of images and crops over a run, as a function of (seed, step) alone.

For every pass the units are permuted, taken a window at a time, and the images of a window are
permuted: near enough to a full shuffle, while wide labels are read a window at a time. Passes
follow one another without a short batch; where m changes a batch may end short. A run that stops
goes on at any step with the very next batch, and any number of processes sees the same batches.

Spread, for methods that ask for independent samples: B images are decoded once, and their m crops
go to m batches that follow one another, crop k of every image to batch k. No batch holds an image
twice. The images of a pass are cut into equal blocks of at most B, so no batch is much shorter
than the others; passes do not share a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, groupby

import numpy as np

from fkdpipe.common.errors import UsageError
from fkdpipe.pixels import crops
from fkdpipe.train.schedule import Pass


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
    """Images that are decoded together: those of one optimiser step, or of m when spread.

    Attributes:
        index: number in the run of the (first) optimiser step. passed: the pass it begins in,
            which sets its learning rate.
        pieces: images of the whole (global) batch. images: how many those are.
        batches: optimiser steps it is for: 1, or m when spread.
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

    spread: no two crops of an image in one batch.
    """

    def __init__(
        self,
        rows: np.ndarray,
        *,
        unit_size: int,
        window: int,
        passes: list[Pass],
        batch_size: int,
        seed: int,
        spread: bool = False,
    ) -> None:
        self._rows = np.sort(rows)
        self._units, starts = np.unique(self._rows // unit_size, return_index=True)
        self._of_unit = dict(
            zip(self._units.tolist(), np.split(self._rows, starts[1:]), strict=True)
        )
        self._window, self._batch_size, self._seed = window, batch_size, seed
        self._windows = -(-len(self._units) // window)
        self._passes, self.spread = passes, spread
        self._stages = [list(group) for _, group in groupby(passes, key=lambda p: p.m)]
        for stage in self._stages:
            if batch_size % stage[0].m:
                raise UsageError(f"batch size {batch_size} is no multiple of {stage[0].m} crops.")

    def __len__(self) -> int:
        """Optimiser steps of the run."""
        return sum(self._steps_of(stage) for stage in self._stages)

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Steps from number `start` on; when spread, from the block that holds it."""
        begun = 0
        for stage in self._stages:
            count = self._steps_of(stage)
            if start < begun + count:
                yield from self._run(stage, begun, max(0, start - begun))
            begun += count

    def windows(self, passed: Pass) -> list[Window]:
        """The windows of a pass, in order; their rows are a permutation of all rows."""
        return [self.window(passed, index) for index in range(self._windows)]

    def window(self, passed: Pass, index: int) -> Window:
        """One window of a pass, made without the others: no pass begins with a pause."""
        seed = crops.derive_seed(self._seed, passed.index)
        units = self._units[crops.random_order(seed, self._units)]
        some = tuple(units[index * self._window : (index + 1) * self._window].tolist())
        rows = np.concatenate([self._of_unit[unit] for unit in some])
        return Window(passed, index, some, rows[crops.random_order(seed + 1, rows)])

    def following(self, window: Window) -> Window | None:
        """The window read after this one, in this pass or as the first of the next."""
        if window.index + 1 < self._windows:
            return self.window(window.passed, window.index + 1)
        after = self._passes[window.passed.index + 1 :][:1]
        return self.window(after[0], 0) if after else None

    def _sizes(self, m: int) -> list[int]:
        """Images of the steps of a stage, again and again."""
        if not self.spread:
            return [self._batch_size // m]
        count = len(self._rows)
        blocks = -(-count // self._batch_size)
        return [count * (k + 1) // blocks - count * k // blocks for k in range(blocks)]

    def _batches(self, m: int) -> int:
        return m if self.spread else 1

    def _steps_of(self, stage: list[Pass]) -> int:
        sizes = self._sizes(stage[0].m)
        images = len(self._rows) * len(stage)
        return -(-images * len(sizes) // sum(sizes)) * self._batches(stage[0].m)

    def _run(self, stage: list[Pass], begun: int, skip: int) -> Iterator[Step]:
        """Cut the stage's stream of windows into steps, beginning with its step `skip`."""
        sizes, batches = self._sizes(stage[0].m), self._batches(stage[0].m)
        rounds, left = divmod(skip // batches, len(sizes))
        offset = rounds * sum(sizes) + sum(sizes[:left])
        coming = cycle(sizes[left:] + sizes[:left])
        size = next(coming)
        first_pass, offset = divmod(offset, len(self._rows))
        index = begun + skip // batches * batches
        pieces: list[Piece] = []
        held = 0
        for passed in stage[first_pass:]:
            for number in range(self._windows):
                window = self.window(passed, number)
                rows = window.rows[offset:] if offset < len(window.rows) else window.rows[:0]
                offset = max(0, offset - len(window.rows))
                while len(rows):
                    piece = rows[: size - held]
                    rows = rows[len(piece) :]
                    pieces.append(Piece(window, piece))
                    held += len(piece)
                    if held == size:
                        yield Step(index, pieces[0].window.passed, tuple(pieces), batches)
                        index, pieces, held, size = index + batches, [], 0, next(coming)
        if pieces:
            yield Step(index, pieces[0].window.passed, tuple(pieces), batches)


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
