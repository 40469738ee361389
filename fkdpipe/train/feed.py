"""(image, crops) over the run + labels + replay -> batches.

The order is decided in `order`, the pixels are made in `replay`; here the two meet the labels.
Batches are read ahead by a bounded amount: `prefetch` requests of pixels and one window of labels.
An image that cannot be read is reported by name and replaced by its neighbour in the batch; a
process whose share holds no other image goes along without weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import StoreMismatchError, TrainingError, UsageError
from fkdpipe.pixels import images, replay
from fkdpipe.pixels.replay import Backend, Pixels, Request, View
from fkdpipe.storage.labels import SparseLabels
from fkdpipe.train.inputs import TrainingSet
from fkdpipe.train.order import Order, Piece, Step, Window, share
from fkdpipe.train.schedule import Pass
from fkdpipe.train.stored import FeatureWindow, LabelBatch, LabelWindow, Scores

log = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.05  # of the images: more is not a broken file but a broken disk


@dataclass(frozen=True)
class Batch:
    """One process's share of a step. B = its crops, image-major (m of an image side by side).

    Attributes:
        step: number of the optimiser step. passed: the pass it begins in.
        m: crops of each image in this batch; 1 when they are spread over batches.
        views: uint8 (B, 3, H, W), channels-last, not normalised, one for each view of the feed;
            the student's is first.
        first_image: place of its first image among the images of the whole step.
        rows_B, crops_B: int64, which row of the list and which of its crops each is.
        class_B: int64, the folder's class.
        labels: of the crops, None for ground truth.
        features: stored features of the crops, float32 (B, ...), None when none were asked for.
        jitter_B4: float32 recorded colour factors (`colour.jitter`), None without any.
        total: crops of the step over all processes.
    """

    step: int
    passed: Pass
    m: int
    views: tuple[torch.Tensor, ...]
    first_image: int
    rows_B: torch.Tensor
    crops_B: torch.Tensor
    class_B: torch.Tensor
    labels: LabelBatch | None
    features: torch.Tensor | None
    jitter_B4: torch.Tensor | None
    total: int

    @property
    def pixels(self) -> torch.Tensor:
        """The student's view."""
        return self.views[0]


class Feed:
    """Batches of a run, from any step on.

    Raises:
        UsageError: a batch that cannot be split, or more crops than the store has.
        StoreMismatchError: images have other sizes than recorded (a resized copy).
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
        self.block = block  # images of a step that no two processes share out
        self.backend, self.threads, self.device = backend, threads, device
        self.rank, self.prefetch = rank, prefetch
        self.failed: dict[str, str] = {}
        self._check_sample()

    def __len__(self) -> int:
        return len(self.order)

    def run(self, start: int = 0) -> Iterator[Batch]:
        """Batches of this process from step `start` on."""
        with (
            replay.open_replay(
                self.backend,
                self.views,
                threads=self.threads,
                prefetch=self.prefetch,
                device=self.device,
            ) as replayer,
            _LabelAhead(self.data, self.order) as labels,
        ):
            for pixels in replayer.run(self._requests(start)):
                whole = self._batch(pixels, labels)
                batches = _spread(whole) if self.order.spread else [whole]
                yield from (batch for batch in batches if batch.step >= start)

    def _requests(self, start: int) -> Iterator[Request]:
        for step in self.order.steps(start):
            first, pieces = share(step, self.rank.index, self.rank.world, self.block)
            if not pieces:  # fewer images than processes: one goes along without weight
                pieces = (Piece(step.pieces[0].window, step.pieces[0].rows[:1]),)
                yield self._request(_Share(step, pieces, 0, idle=True))
            else:
                yield self._request(_Share(step, pieces, first, idle=False))

    def _request(self, ours: _Share) -> Request:
        pieces = ours.pieces
        rows = np.concatenate([piece.rows for piece in pieces])
        drawn = [self.data.boxes(p.rows, self.data.crops_of(p.window.passed)) for p in pieces]
        return Request(
            paths=[images.path_of(self.data.root, key) for key in self.data.keys[rows]],
            size_I2=self.data.size_N2[rows],
            box_Im4=np.concatenate([box for box, _ in drawn]),
            flip_Im=np.concatenate([flip for _, flip in drawn]),
            tag=ours,
        )

    def _batch(self, pixels: Pixels, labels: _LabelAhead) -> Batch:
        ours: _Share = pixels.request.tag  # type: ignore[assignment]
        step, pieces = ours.step, ours.pieces
        m = step.passed.m
        rows_I = np.concatenate([piece.rows for piece in pieces])
        crops_Im = np.concatenate(
            [np.tile(self.data.crops_of(p.window.passed), (len(p.rows), 1)) for p in pieces]
        )
        taken, features = labels.take(pieces)
        jitter_B4 = self._factors(pieces)
        views = tuple(pixels.views)
        bad = self._report(pixels, rows_I)
        lost = len(bad) == len(rows_I)  # nothing to replace them by: zero pixels, without weight
        if bad and not lost:
            source_I = _replacements(bad, len(rows_I))
            source_B = (source_I[:, None] * m + np.arange(m)).ravel()
            rows_I, crops_Im = rows_I[source_I], crops_Im[source_I]
            views = tuple(view[torch.from_numpy(source_B)] for view in views)
            taken = _select(taken, source_B)
            features = None if features is None else features[source_B]
            jitter_B4 = None if jitter_B4 is None else jitter_B4[source_B]
        return Batch(
            step=step.index,
            passed=step.passed,
            m=m,
            views=views,
            first_image=ours.first_image,
            rows_B=torch.from_numpy(np.repeat(rows_I, m)),
            crops_B=torch.from_numpy(crops_Im.ravel()),
            class_B=torch.from_numpy(np.repeat(self.data.class_N[rows_I], m)).long(),
            labels=taken,
            features=None if features is None else torch.from_numpy(features),
            jitter_B4=None if jitter_B4 is None else torch.from_numpy(jitter_B4),
            total=0 if ours.idle or lost else step.images * m,
        )

    def _factors(self, pieces: Sequence[Piece]) -> np.ndarray | None:
        """float32 (B, 4) colour factors."""
        draw = self.data.jitter
        if draw is None:
            return None
        drawn = [draw(p.rows, self.data.crops_of(p.window.passed)) for p in pieces]
        return np.concatenate(drawn).reshape(-1, 4)

    def _report(self, pixels: Pixels, rows_I: np.ndarray) -> set[int]:
        """Places of the batch's broken images; too many of them over the run are an error."""
        for failure in pixels.failures:
            key = str(self.data.keys[rows_I[failure.image]])
            if key not in self.failed:
                log.warning("%s is replaced: %s, %s", key, failure.code, failure.detail)
            self.failed[key] = f"{failure.code}: {failure.detail}"
        if len(self.failed) > max(10, MAX_FAILED_SHARE * len(self.data.rows)):
            key, why = next(iter(self.failed.items()))
            raise TrainingError(
                f"{len(self.failed)} images could not be read, for example {key}: {why}. Check "
                f"{self.data.root}; the run goes on from its last checkpoint when started again.",
                code="images-lost",
            )
        return {failure.image for failure in pixels.failures}

    def _check_sample(self) -> None:
        """Before hours are spent: do some images still have the recorded size?"""
        some = self.data.rows[:: max(1, len(self.data.rows) // 32)]
        request = Request(
            paths=[images.path_of(self.data.root, key) for key in self.data.keys[some]],
            size_I2=self.data.size_N2[some],
            box_Im4=np.tile(np.array([0, 0, 1, 1], dtype=np.uint16), (len(some), 1, 1)),
            flip_Im=np.zeros((len(some), 1), dtype=bool),
        )
        with replay.open_replay("cpu", [View((8, 8))], threads=self.threads) as replayer:
            (pixels,) = replayer.run([request])
        for failure in pixels.failures:
            if failure.code == "size-differs":
                key = self.data.keys[some[failure.image]]
                raise StoreMismatchError(
                    f"{self.data.root}: {key} {failure.detail}. The labels belong to crops of the "
                    "images as they were; give the folder the store was made for.",
                    code="size-differs",
                )
        if len(pixels.failures) > len(some) // 2:
            failure = pixels.failures[0]
            raise StoreMismatchError(
                f"{self.data.root}: {len(pixels.failures)} of {len(some)} images looked at cannot "
                f"be read, for example {self.data.keys[some[failure.image]]}: {failure.detail}.",
                code="images-lost",
            )


@dataclass(frozen=True)
class _Share:
    """What a request is for. idle: it only keeps this process going along, without weight."""

    step: Step
    pieces: tuple[Piece, ...]
    first_image: int
    idle: bool


@dataclass(frozen=True)
class _Opened:
    """One window's labels and features."""

    labels: LabelWindow | None
    features: FeatureWindow | None


class _LabelAhead:
    """Windows of labels and features in use, and the next one being read in a thread."""

    def __init__(self, data: TrainingSet, order: Order) -> None:
        self._data, self._order = data, order
        self._open: dict[tuple[int, int], Future[_Opened]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="labels")
        self._reached = (-1, -1)

    def __enter__(self) -> _LabelAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, pieces: Sequence[Piece]) -> tuple[LabelBatch | None, np.ndarray | None]:
        """Labels and features of a batch's pieces, joined."""
        if self._data.labels is None and self._data.features is None:
            return None, None
        opened = [self._window(piece.window) for piece in pieces]
        both = list(zip(opened, pieces, strict=True))
        labels = [o.labels.take(p.rows) for o, p in both if o.labels is not None]
        features = [o.features.take(p.rows) for o, p in both if o.features is not None]
        for key in [key for key in self._open if key < pieces[0].window.key]:
            del self._open[key]
        return _join(labels) if labels else None, np.concatenate(features) if features else None

    def _window(self, window: Window) -> _Opened:
        future = self._begin(window)
        if window.key > self._reached:  # its first batch: the next window is read meanwhile
            self._reached = window.key
            following = self._order.following(window)
            if following is not None:
                self._begin(following)
        return future.result()

    def _begin(self, window: Window) -> Future[_Opened]:
        if window.key not in self._open:
            self._open[window.key] = self._pool.submit(self._read, window)
        return self._open[window.key]

    def _read(self, window: Window) -> _Opened:
        data, crops_m = self._data, self._data.crops_of(window.passed)
        return _Opened(
            data.labels.open_window(window.units, crops_m) if data.labels else None,
            data.features.open_window(window.units, crops_m) if data.features else None,
        )


def _replacements(bad: set[int], images: int) -> np.ndarray:
    """For every image of a batch the image whose crops stand in its place, not all being bad."""
    good = np.array([k for k in range(images) if k not in bad])
    after = np.searchsorted(good, np.arange(images)) % len(good)
    return good[after]


def _join(taken: list[LabelBatch]) -> LabelBatch:
    if len(taken) == 1:
        return taken[0]
    first = taken[0]
    if isinstance(first, Scores):
        return Scores(np.concatenate([t.scores_BC for t in taken]), first.temperature)  # type: ignore[union-attr]
    return SparseLabels(
        *(np.concatenate([getattr(t, name) for t in taken]) for name in _SPARSE_FIELDS)
    )


def _spread(whole: Batch) -> Iterator[Batch]:
    """m batches of one crop of each image: crop k of every image is in batch k.

    Pixels are copied, so that each batch lies in one piece on its way to the device.
    """
    for k in range(whole.m):
        every = slice(k, None, whole.m)
        yield replace(
            whole,
            step=whole.step + k,
            m=1,
            views=tuple(
                v[every].contiguous(memory_format=torch.channels_last) for v in whole.views
            ),
            rows_B=whole.rows_B[every],
            crops_B=whole.crops_B[every],
            class_B=whole.class_B[every],
            labels=_select(whole.labels, np.arange(len(whole.rows_B))[every]),
            features=None if whole.features is None else whole.features[every],
            jitter_B4=None if whole.jitter_B4 is None else whole.jitter_B4[every],
            total=whole.total // whole.m,
        )


def _select(labels: LabelBatch | None, rows_B: np.ndarray) -> LabelBatch | None:
    if labels is None:
        return None
    if isinstance(labels, Scores):
        return Scores(labels.scores_BC[rows_B], labels.temperature)
    return SparseLabels(*(getattr(labels, name)[rows_B] for name in _SPARSE_FIELDS))


_SPARSE_FIELDS = ("ids_BK", "prob_BK", "rest_B")


def check_batch(batch_size: int, m: int, world: int, block: int = 1) -> None:
    """Raises UsageError when processes cannot share a step's blocks of images evenly."""
    if batch_size % (m * world * block):
        blocks = f" x {block} images mixed with each other" if block > 1 else ""
        raise UsageError(
            f"batch size {batch_size} (crops, over all processes) must be a multiple of "
            f"{m} crops per image x {world} processes{blocks}."
        )
