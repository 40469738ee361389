"""Labels of a store as probabilities, read block by block.

A block holds some images of one unit and the crops of one crop group. It fits in memory in any
form, and is read from a wide array at once.

Letters: I images of a block, m crops of each, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fkdpipe.common.errors import StoreError, StoreMismatchError
from fkdpipe.common.progress import Reporter, shared, silent
from fkdpipe.networks.models import SELF_SUPERVISED
from fkdpipe.storage import labels, reader
from fkdpipe.storage.labels import Target
from fkdpipe.storage.reader import CropReader, Finished, Segment, SparseReader, WideReader
from fkdpipe.storage.schema import Json
from fkdpipe.storage.settings import LabelSettings
from fkdpipe.storage.store import Store

BLOCK_VALUES = 2**23  # probabilities per block: 32 MiB as float32


class Labels:
    """Labels of one source as dense probabilities.

    For `topk`, the remaining probability is spread evenly (marginal smoothing); `hard` gives
    one-hot rows; `logits` use temperature 1.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        segments: Sequence[Segment],
        cache_dir: Path,
        reporter: Reporter = silent,
    ) -> None:
        self.name = name
        self.form = reader.label_form(segments)
        settings: LabelSettings = segments[0].part.settings
        self.classes, self.teachers = settings.classes, settings.teachers
        self._store = store
        self._cached: tuple[int, tuple[int, ...], np.ndarray] | None = None
        self._reader: SparseReader | WideReader
        if self.form.sparse:
            with reporter.task("labels", store.num_images, "images") as advance_images:
                advance = shared(advance_images, len(segments))
                self._reader = SparseReader(store, segments, cache_dir, advance)
        else:
            self._reader = WideReader(store, segments, self.form.value_field)

    @property
    def exact(self) -> bool:
        """Whether all probabilities are stored, so that none are filled in."""
        return not self.form.sparse or self.form.k == self.classes

    def take(self, rows_I: np.ndarray, crops_m: np.ndarray) -> np.ndarray:
        """float32 (I, m, C); each row sums to 1. All images must be of one unit."""
        shape = (len(rows_I), len(crops_m), self.classes)
        if isinstance(self._reader, SparseReader):
            kind = self.form.kind
            target = Target("hard") if kind == "hard" else Target("marginal-smoothing", self.form.k)
            return labels.to_dense(
                self._reader.take(rows_I, crops_m, target), self.classes
            ).reshape(shape)
        unit = int(rows_I[0]) // self._store.unit_size
        key = (unit, tuple(crops_m.tolist()))
        if self._cached is None or self._cached[:2] != key:  # blocks of a unit share the scores
            self._cached = (*key, self._reader.unit(unit, crops_m))
        scores = self._cached[2][rows_I - unit * self._store.unit_size]
        return labels.softmax(scores.reshape(-1, self.classes)).reshape(shape)


@dataclass(frozen=True)
class Opened:
    """Opened labels and crops of a store.

    Attributes:
        finished: the images and crops with labels.
        labels: of each source, with the same crops and classes.
        truth_N: int64, class of each image among the labels' classes; -1 if unknown.
        class_names: of the labels' classes; their indices if the store has no names.
    """

    store: Store
    finished: Finished
    boxes: CropReader
    labels: tuple[Labels, ...]
    truth_N: np.ndarray
    class_names: tuple[str, ...]

    @property
    def classes(self) -> int:
        return self.labels[0].classes


def open_labels(
    store: Store,
    sources: Sequence[str],
    cache_dir: Path,
    *,
    allow_partial: bool = False,
    reporter: Reporter = silent,
) -> Opened:
    """Open label sources of a store; by default its only one.

    Args:
        allow_partial: use the finished units of an unsealed store.

    Raises:
        StoreError: no such source, or no image with labels.
        StoreMismatchError: the sources have different classes.
        UnsealedStoreError: the store is unfinished, unless `allow_partial`.
    """
    names = list(dict.fromkeys(sources)) or [reader.choose_source(store, None)]
    finished = reader.finished(
        store, [("labels", name, "") for name in names], allow_partial=allow_partial
    )
    if not len(finished.rows):
        raise StoreError(f"{store.url} has no image with labels yet.", code="no-labels")
    opened = tuple(
        Labels(store, name, segments, cache_dir, reporter)
        for name, segments in zip(names, finished.labels, strict=True)
    )
    widths = {labels.name: labels.classes for labels in opened}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise StoreMismatchError(
            f"sources with different numbers of classes cannot be compared: {listed}."
        )
    classes = opened[0].classes
    named = len(store.images.class_names) == classes and not _projected(opened[0].teachers)
    return Opened(
        store=store,
        finished=finished,
        boxes=CropReader(store, finished.crops, cache_dir),
        labels=opened,
        truth_N=np.where(named, store.images.class_N, -1).astype(np.int64),
        class_names=store.images.class_names if named else tuple(map(str, range(classes))),
    )


def _projected(teachers: Sequence[Json]) -> bool:
    """Whether the labels are scores of a projection head, not of classes."""
    return any(teacher.get("library") in SELF_SUPERVISED for teacher in teachers)


def sample_rows(opened: Opened, images: int) -> np.ndarray:
    """int64: the first `images` rows with labels; 0 for all.

    The store's order is a random permutation, so these are an unbiased sample.
    """
    return opened.finished.rows[:images] if images else opened.finished.rows


def blocks(
    opened: Opened, rows_N: np.ndarray, crops_M: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Divide crops into blocks (rows_I, crops_m) that cover each crop once.

    Args:
        rows_N, crops_M: sorted.
    """
    store, group = opened.store, opened.store.group_size
    cuts = np.flatnonzero(np.diff(rows_N // store.unit_size)) + 1
    for unit_rows in np.split(rows_N, cuts):
        for crops_m in np.split(crops_M, np.flatnonzero(np.diff(crops_M // group)) + 1):
            step = max(BLOCK_VALUES // (opened.classes * len(crops_m)), 1)
            for first in range(0, len(unit_rows), step):
                yield unit_rows[first : first + step], crops_m
