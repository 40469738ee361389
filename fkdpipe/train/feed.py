"""Batches in host memory: images and crops in training order, with pixels and labels.

`order` decides the order and `replay` produces the pixels; this module adds the labels. Reading
ahead is bounded: `prefetch` requests of pixels and one window of labels. An unreadable image is
reported by name and replaced by its neighbour in the batch; a process whose share has no readable
image contributes zero weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import TrainingError, UsageError
from fkdpipe.pixels import replay
from fkdpipe.pixels.crops import join
from fkdpipe.pixels.replay import Backend, Pixels, Request, View
from fkdpipe.train.batch import HostBatch, one_crop_each, select
from fkdpipe.train.data import TrainingSet
from fkdpipe.train.order import Order, Piece, Step, Window, share
from fkdpipe.train.stored import Values
from fkdpipe.train.stored import Window as OpenWindow

log = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.05  # of all images; more suggests a broken disk, not broken files


class Feed:
    """Batches of a run, starting at any step.

    Args:
        block: number of consecutive images of a step that stay in one process (mixup, CutMix).
    """

    def __init__(
        self,
        data: TrainingSet,
        order: Order,
        views: Sequence[View],
        *,
        backend: Backend,
        threads: int,
        device: torch.device,
        rank: Rank,
        prefetch: int = 2,
        block: int = 1,
    ) -> None:
        self.data, self.order, self.views = data, order, tuple(views)
        self.backend, self.threads, self.device = backend, threads, device
        self.rank, self.prefetch, self.block = rank, prefetch, block
        self.failed: dict[str, str] = {}

    def stream(self, start: int = 0) -> Iterator[HostBatch]:
        """Batches of this process, starting at step `start`.

        Raises:
            TrainingError: too many unreadable images.
            DamagedStoreError: labels fail their checksum.
        """
        with (
            replay.open_replay(
                self.backend,
                self.views,
                threads=self.threads,
                prefetch=self.prefetch,
                device=self.device,
            ) as replayer,
            _Windows(self.data, self.order) as windows,
        ):
            for pixels in replayer.run(self._requests(start)):
                whole = self._batch(pixels, windows)
                batches = one_crop_each(whole) if self.order.independent else [whole]
                yield from (batch for batch in batches if batch.step >= start)

    def _requests(self, start: int) -> Iterator[Request]:
        for step in self.order.steps(start):
            first, pieces = share(step, self.rank.index, self.rank.world, self.block)
            idle = not pieces  # fewer images than processes
            if idle:
                pieces = step.take(0, max(1, min(step.least, step.full // self.rank.world)))
            rows = np.concatenate([piece.rows for piece in pieces])
            boxes = join(
                [self.data.crops(p.rows, self.data.crops_of(p.window.passed)) for p in pieces]
            )
            data, tag = self.data, _Share(step, pieces, first, boxes.jitter_NM4, idle)
            yield Request.of(data.root, data.keys[rows], data.size_N2[rows], boxes, tag)

    def _batch(self, pixels: Pixels, windows: _Windows) -> HostBatch:
        share_: _Share = pixels.request.tag  # type: ignore[assignment]
        step, pieces = share_.step, share_.pieces
        m = step.passed.m
        rows_I = np.concatenate([piece.rows for piece in pieces])
        crops_Im = [np.tile(self.data.crops_of(p.window.passed), (len(p.rows), 1)) for p in pieces]
        values = {
            "row": np.repeat(rows_I, m),
            "crop": np.concatenate(crops_Im).ravel(),
            **windows.take(pieces),
        }
        if share_.jitter_Im4 is not None:
            values["jitter"] = share_.jitter_Im4.reshape(-1, 4)
        bad = self._report(pixels, rows_I)
        lost = len(bad) == len(rows_I)  # no replacement: zero pixels, zero weight
        batch = HostBatch(
            step=step.index,
            passed=step.passed,
            m=m,
            first_image=share_.first_image,
            total=0 if share_.idle or lost else step.images * m,
            views=tuple(pixels.views),
            values=values,
        )
        if bad and not lost:
            source_I = _replacements(bad, len(rows_I))
            return select(batch, (source_I[:, None] * m + np.arange(m)).ravel())
        return batch

    def _report(self, pixels: Pixels, rows_I: np.ndarray) -> set[int]:
        """Positions of the batch's unreadable images. Too many over the run are an error."""
        for failure in pixels.failures:
            key = str(self.data.keys[rows_I[failure.image]])
            if key not in self.failed:
                log.warning("%s is replaced: %s, %s", key, failure.code, failure.detail)
            self.failed[key] = f"{failure.code}: {failure.detail}"
        if len(self.failed) > max(10, MAX_FAILED_SHARE * len(self.data.rows)):
            key, why = next(iter(self.failed.items()))
            raise TrainingError(
                f"{len(self.failed)} images could not be read, for example {key}: {why}. Check "
                f"{self.data.root}; the same command resumes the run from its last checkpoint.",
                code="images-lost",
            )
        return {failure.image for failure in pixels.failures}


@dataclass(frozen=True)
class _Share:
    """One process's share of a step. idle: the process only takes part, with zero weight."""

    step: Step
    pieces: tuple[Piece, ...]
    first_image: int
    jitter_Im4: np.ndarray | None
    idle: bool


class _Windows:
    """Open windows of labels and features; a thread reads the next one."""

    def __init__(self, data: TrainingSet, order: Order) -> None:
        self._sources = [source for source in (data.labels, data.features) if source is not None]
        self._data, self._order = data, order
        self._open: dict[tuple[int, int], Future[list[OpenWindow]]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="labels")
        self._reached = (-1, -1)

    def __enter__(self) -> _Windows:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, pieces: Sequence[Piece]) -> Values:
        """Values of a batch's pieces, joined."""
        if not self._sources:
            return {}
        parts = [
            {name: array for take in self._window(p.window) for name, array in take(p.rows).items()}
            for p in pieces
        ]
        for key in [key for key in self._open if key < pieces[0].window.key]:
            del self._open[key]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _window(self, window: Window) -> list[OpenWindow]:
        future = self._begin(window)
        if window.key > self._reached:  # first batch of the window: start reading the next
            self._reached = window.key
            following = self._order.following(window)
            if following is not None:
                self._begin(following)
        return future.result()

    def _begin(self, window: Window) -> Future[list[OpenWindow]]:
        if window.key not in self._open:
            self._open[window.key] = self._pool.submit(self._read, window)
        return self._open[window.key]

    def _read(self, window: Window) -> list[OpenWindow]:
        crops_m = self._data.crops_of(window.passed)
        return [source.open(window.units, crops_m) for source in self._sources]


def _replacements(bad: set[int], images: int) -> np.ndarray:
    """For every position of a batch, the image to use there. At least one image must be good."""
    good = np.array([k for k in range(images) if k not in bad])
    after = np.searchsorted(good, np.arange(images)) % len(good)
    return good[after]


def check_batch(batch_size: int, m: int, world: int, block: int = 1) -> None:
    """Raise UsageError if the batch does not divide evenly over crops, processes and blocks."""
    if batch_size < 1 or m < 1:
        raise UsageError(
            f"batch size and crops per image must be at least 1; found {batch_size} and {m}."
        )
    if batch_size % (m * world * block):
        blocks = f" x {block} images mixed with each other" if block > 1 else ""
        raise UsageError(
            f"batch size {batch_size} (crops, over all processes) must be a multiple of "
            f"{m} crops per image x {world} processes{blocks}."
        )
