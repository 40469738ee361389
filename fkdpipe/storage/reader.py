"""Read a store for training: boxes and labels by (image, crop).

Narrow arrays come from the local cache (`cache`), wide ones are streamed a crop group at a time.
The rounds of a store form one long list of crops per image.

Letters: I requested images, m crops of each.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fkdpipe.common.errors import StoreError, StoreMismatchError, UnsealedStoreError
from fkdpipe.pixels.crops import Crops, join
from fkdpipe.storage import cache, commits, labels, rounds
from fkdpipe.storage.commits import Manifest
from fkdpipe.storage.labels import Form, SparseLabels, Target
from fkdpipe.storage.settings import LabelSettings
from fkdpipe.storage.store import Part, Store

Progress = Callable[[int], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """One round of the crops: crop c of an image is crop c - first of this part."""

    part: Part
    manifest: Manifest
    first: int

    @property
    def count(self) -> int:
        return self.part.settings.crops


@dataclass(frozen=True)
class Finished:
    """The crops and images of a store that can be read.

    Attributes:
        crops: segments of the boxes, in order. labels: those of each source of labels or features.
        rows: int64, rows of the store whose unit is committed in every segment and whose image
            did not fail in any.
        failed: row to (code, detail) of images that failed.
        crops_per_image: M over all segments.
    """

    crops: tuple[Segment, ...]
    labels: tuple[tuple[Segment, ...], ...]
    rows: np.ndarray
    failed: dict[int, tuple[str, str]]
    crops_per_image: int


def finished(
    store: Store,
    parts: Sequence[tuple[str, str, str]],
    *,
    allow_partial: bool = False,
    crops: int | None = None,
) -> Finished:
    """Find the crops and images that can be read from some sources.

    A round that is not finished does not block the rounds before it.

    Args:
        parts: (kind, source, layer) of each source: ("labels", "teacher", "").
        allow_partial: read the finished units of an unsealed store.
        crops: read only the first rounds, until they hold this many crops per image.

    Raises:
        UnsealedStoreError: the first round is not finished, unless `allow_partial`.
        StoreError: no such source.
    """
    columns = zip(*_readable_rounds(store, parts, crops), strict=True)
    boxes, *labels_ = (_segments(store, column, allow_partial=allow_partial) for column in columns)
    everything = [*boxes, *itertools.chain(*labels_)]
    failed = {row: why for segment in everything for row, why in segment.manifest.failed.items()}
    usable = np.zeros(store.num_images, dtype=bool)
    for unit in set.intersection(*(set(segment.manifest.facts) for segment in everything)):
        usable[store.unit_rows(unit)] = True
    usable[list(failed)] = False
    crops_M = sum(segment.count for segment in boxes)
    return Finished(boxes, tuple(labels_), np.flatnonzero(usable), failed, crops_M)


def _readable_rounds(
    store: Store, sources: Sequence[tuple[str, str, str]], crops: int | None
) -> list[list[Part]]:
    """For each round that can be read: its crops, then the part of each source.

    Ends before the first round that lacks a source or is not finished, and where the rounds hold
    as many crops as requested.
    """
    if not store.rounds():
        raise UnsealedStoreError(f"{store.url} has no crops yet; run `fkdpipe generate`.")
    for kind, source, layer in sources:
        known = store.sources(kind, layer)
        if source not in known:
            raise StoreError(
                f"{store.url} has no {kind} of {source!r}; it has {', '.join(known) or 'none'}.",
                code="no-source",
            )
    readable: list[list[Part]] = []
    count = 0
    for boxes in store.rounds():
        paths = [boxes.path, *(_path(boxes.round, *each) for each in sources)]
        if count == crops or not all(path in store.parts for path in paths):
            break
        parts = [store.part(path) for path in paths]
        if readable and any(store.manifest(part) is None for part in parts):
            log.warning(
                "%s is still growing; using the first %d crops of each image", store.url, count
            )
            break
        readable.append(parts)
        count += boxes.settings.crops
    if not readable:
        raise StoreError(f"{store.url}: no round has all of {sources}.", code="no-source")
    return readable


def _path(round_: int, kind: str, source: str, layer: str) -> str:
    return "/".join(filter(None, ["rounds", str(round_), kind, source, layer]))


def _segments(store: Store, parts: Sequence[Part], *, allow_partial: bool) -> tuple[Segment, ...]:
    """The segments of one source, in order of round."""
    segments: list[Segment] = []
    first = 0
    for part in parts:
        segments.append(Segment(part, _manifest(store, part, allow_partial=allow_partial), first))
        first += part.settings.crops
    return tuple(segments)


def _manifest(store: Store, part: Part, *, allow_partial: bool) -> Manifest:
    if not allow_partial:
        return store.sealed(part)
    manifest = store.manifest(part)
    if manifest is None:
        markers = {unit: marker for unit, marker in store.markers(part) if marker is not None}
        manifest = commits.manifest_of(part.path, part.settings_digest, markers)
    return manifest


def choose_source(store: Store, source: str | None, kind: str = "labels", layer: str = "") -> str:
    """The requested source, or the only one.

    Raises:
        StoreError: none is requested, and the store has several or none.
    """
    known = store.sources(kind, layer)
    if source is not None:
        return source
    if len(known) == 1:
        return known[0]
    what = f"{kind} {layer}".strip()
    if not known:
        raise StoreError(f"{store.url} holds no {what}.", code="no-source")
    raise StoreError(
        f"{store.url} holds {what} of {', '.join(known)}; choose one with --source.",
        code="which-source",
    )


def joined(
    segments: Sequence[Segment],
    crops_m: np.ndarray,
    read: Callable[[Segment, np.ndarray], np.ndarray],
) -> np.ndarray:
    """(rows, m, ...) values of some crops, read segment by segment and joined along the crops.

    Args:
        read: (segment, crops within it) to their values.
    """
    which = np.searchsorted([s.first for s in segments], crops_m, side="right") - 1
    cuts = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(crops_m)]
    parts = []
    for begin, end in itertools.pairwise(cuts):
        segment = segments[which[begin]]
        parts.append(read(segment, crops_m[begin:end] - segment.first))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def read_unit(
    store: Store, segments: Sequence[Segment], name: str, unit: int, crops_m: np.ndarray
) -> np.ndarray:
    """(images of the unit, m, ...) values of a field; see `Store.read`."""

    def read(segment: Segment, local_m: np.ndarray) -> np.ndarray:
        return store.read(segment.part, name, unit, local_m, files=segment.manifest.files)

    return joined(segments, crops_m, read)


def read_crops(store: Store, segments: Sequence[Segment], unit: int, count: int) -> Crops:
    """The first `count` crops of each image of a unit, stored or derived (`rounds.crops_of`)."""
    needed = (segment for segment in segments if segment.first < count)
    parts = [rounds.crops_of(store, segment.part, unit) for segment in needed]
    return join(parts, axis=1)[:, :count]


class CachedFields:
    """Narrow fields of some segments, from the local cache."""

    def __init__(
        self,
        store: Store,
        segments: Sequence[Segment],
        cache_dir: Path,
        on_images: Progress = lambda count: None,
    ) -> None:
        self.segments = segments
        self._maps = {
            s.part.path: cache.fill(store, s.part, s.manifest, cache_dir, on_images=on_images)
            for s in segments
        }

    def take(self, field: str, rows_I: np.ndarray, crops_m: np.ndarray) -> np.ndarray:
        """(I, m, ...) values of a field."""

        def read(segment: Segment, local_m: np.ndarray) -> np.ndarray:
            return self._maps[segment.part.path][field][rows_I[:, None], local_m[None, :]]

        return joined(self.segments, crops_m, read)


class CropReader:
    """Boxes, flips and colour jitter of recorded crops."""

    def __init__(
        self,
        store: Store,
        segments: Sequence[Segment],
        cache_dir: Path,
        on_images: Progress = lambda count: None,
    ) -> None:
        self._fields = CachedFields(store, segments, cache_dir, on_images)
        # All rounds of a store have the same distribution.
        self._jitter = segments[0].part.settings.jitter is not None

    def take(self, rows_I: np.ndarray, crops_m: np.ndarray) -> Crops:
        """The recorded crops, (I, m)."""
        box, flip = (self._fields.take(name, rows_I, crops_m) for name in ("box", "flip"))
        jitter = self._fields.take("jitter", rows_I, crops_m) if self._jitter else None
        return Crops(box, flip, jitter)


class SparseReader:
    """Labels of form `topk` or `hard`, converted to a target."""

    def __init__(
        self,
        store: Store,
        segments: Sequence[Segment],
        cache_dir: Path,
        on_images: Progress = lambda count: None,
    ) -> None:
        settings: LabelSettings = segments[0].part.settings
        self.form, self.classes = settings.form, settings.classes
        self._fields = CachedFields(store, segments, cache_dir, on_images)

    def take(self, rows_I: np.ndarray, crops_m: np.ndarray, target: Target) -> SparseLabels:
        """B = I * m rows, image-major."""
        ids = self._fields.take("ids", rows_I, crops_m).reshape(-1, self.form.k)
        prob = np.ones((len(ids), 1), dtype=np.float32)
        if self.form.kind == "topk":
            stored = self._fields.take(self.form.value_field, rows_I, crops_m)
            prob = labels.decode_probabilities(self.form, stored.reshape(-1, self.form.k))
        return labels.sparse_target(target, ids, prob, self.classes)


class WideReader:
    """A wide field, streamed: only the crop groups that hold the requested crops are read."""

    def __init__(self, store: Store, segments: Sequence[Segment], field: str) -> None:
        self.store, self.segments, self.field_name = store, segments, field

    def unit(self, unit: int, crops_m: np.ndarray) -> np.ndarray:
        """(images of the unit, m, ...) values.

        Raises:
            DamagedStoreError: a shard differs from what was committed.
        """
        return read_unit(self.store, self.segments, self.field_name, unit, crops_m)

    def units(self, units: Sequence[int], crops_m: np.ndarray) -> dict[int, np.ndarray]:
        """`unit` for several units; the next one is read while one is decoded."""
        with ThreadPoolExecutor(2, thread_name_prefix="wide") as pool:
            values = pool.map(lambda unit: self.unit(unit, crops_m), units)
            return dict(zip(units, values, strict=True))


def label_form(segments: Sequence[Segment]) -> Form:
    """The form of a source, which all its segments share."""
    return segments[0].part.settings.form


def check_temperature(segments: Sequence[Segment], requested: float | None) -> float:
    """The factor to divide stored scores by to get labels at the requested temperature.

    Raises:
        StoreMismatchError: the stored form fixes the temperature.
    """
    settings: LabelSettings = segments[0].part.settings
    form, stored = settings.form, settings.temperature
    if form.kind == "logits":
        return 1.0 if requested is None else requested
    if requested is None or requested == stored:
        return 1.0
    if stored is None:
        raise StoreMismatchError(
            "these labels were imported and their temperature is unknown, so it cannot be changed "
            f"to {requested:g}. Leave the temperature out to use the labels as they are.",
            code="temperature",
        )
    if form.kind == "full" and len(settings.teachers) == 1:
        return requested / stored
    raise StoreMismatchError(
        f"these labels were made at temperature {stored:g}, and form {form}"
        f"{' of several teachers' if form.kind == 'full' else ''} cannot be changed to "
        f"{requested:g}. Generate with --form logits to choose it at training time.",
        code="temperature",
    )
