"""Reading a store for training: boxes and labels by (image, crop).

Narrow arrays come from the local cache (`cache`), wide ones are streamed a crop group at a time.
All rounds of a store count as one long list of crops per image.

Letters: I images asked for, m crops of each.
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
from fkdpipe.storage import cache, commits, labels, schema
from fkdpipe.storage.arrays import Arrays
from fkdpipe.storage.commits import Manifest
from fkdpipe.storage.labels import Form, SparseLabels, Target
from fkdpipe.storage.store import Part, Store

Progress = Callable[[int], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """One round's share of the crops: crop c of an image is crop c - first of this part."""

    part: Part
    manifest: Manifest
    first: int
    count: int


@dataclass(frozen=True)
class Finished:
    """What of a store can be read: which crops, and which images.

    Attributes:
        crops: segments of the boxes, in order. labels: of the labels or features, one each.
        rows: int64, rows of the store whose unit is committed in every segment and whose image
            did not fail in any.
        failed: row to (code, detail) of the images that did.
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
    """Find what can be read of the crops and of some sources.

    A round that is still being made does not stand in the way of those before it.

    Args:
        parts: (kind, source, layer) of each source wanted: ("labels", "teacher", "").
        allow_partial: read the finished units of an unsealed store.
        crops: read only the first rounds, until they have so many crops per image.

    Raises:
        UnsealedStoreError: something of the first round is missing, unless `allow_partial`.
        StoreError: no such source.
    """
    rounds = store.rounds()
    if not rounds:
        raise UnsealedStoreError(f"{store.url} has no crops yet; run `fkdpipe generate`.")
    for kind, source, layer in parts:
        known = store.sources(kind, layer)
        if source not in known:
            raise StoreError(
                f"{store.url} has no {kind} of {source!r}; it has {', '.join(known) or 'none'}.",
                code="no-source",
            )
    crop_segments: list[Segment] = []
    label_segments: list[list[Segment]] = [[] for _ in parts]
    first = 0
    for box_part in rounds:
        paths = [_path(box_part.round, *wanted) for wanted in parts]
        if not all(path in store.parts for path in paths) or first == crops:
            break  # a later round that only other sources have, or that nobody asked for
        count = int(box_part.settings["crops"])
        wanted_parts = [box_part, *(store.part(path) for path in paths)]
        if first and any(store.manifest(part) is None for part in wanted_parts):
            log.warning(
                "%s is still growing; its first %d crops of each image are read", store.url, first
            )
            break
        for segments, part in zip([crop_segments, *label_segments], wanted_parts, strict=True):
            manifest = _manifest(store, part, allow_partial=allow_partial)
            segments.append(Segment(part, manifest, first, count))
        first += count
    if not crop_segments:
        raise StoreError(f"{store.url}: no round has all of {parts}.", code="no-source")
    everything = [*crop_segments, *(s for segments in label_segments for s in segments)]
    failed = {row: why for s in everything for row, why in s.manifest.failed.items()}
    units = set.intersection(*(set(segment.manifest.made) for segment in everything))
    usable = np.zeros(store.num_images, dtype=bool)
    for unit in units:
        usable[store.unit_rows(unit)] = True
    usable[list(failed)] = False
    return Finished(
        crops=tuple(crop_segments),
        labels=tuple(tuple(segments) for segments in label_segments),
        rows=np.flatnonzero(usable),
        failed=failed,
        crops_per_image=first,
    )


def _path(round_: int, kind: str, source: str, layer: str) -> str:
    return "/".join(filter(None, ["rounds", str(round_), kind, source, layer]))


def _manifest(store: Store, part: Part, *, allow_partial: bool) -> Manifest:
    if not allow_partial:
        return store.sealed(part)
    manifest = store.manifest(part)
    if manifest is None:
        found = {unit: marker for unit, marker in store.markers(part) if marker is not None}
        manifest = commits.manifest_of(part.path, part.settings_digest, found)
    return manifest


def choose_source(store: Store, asked: str | None, kind: str = "labels", layer: str = "") -> str:
    """The source asked for, or the only one.

    Raises:
        StoreError: several and none was asked for, or none at all.
    """
    known = store.sources(kind, layer)
    if asked is not None:
        return asked
    if len(known) == 1:
        return known[0]
    what = f"{kind} {layer}".strip()
    if not known:
        raise StoreError(f"{store.url} holds no {what}.", code="no-source")
    raise StoreError(
        f"{store.url} holds {what} of {', '.join(known)}; choose one with --source.",
        code="which-source",
    )


class Hydrated:
    """Narrow fields of some segments, joined along the crops."""

    def __init__(
        self,
        store: Store,
        segments: Sequence[Segment],
        cache_dir: Path,
        on_images: Progress = lambda count: None,
    ) -> None:
        self.segments = segments
        self._maps = [
            cache.hydrate(store, s.part, s.manifest, cache_dir, on_images=on_images)
            for s in segments
        ]

    def take(self, field: str, rows_I: np.ndarray, crops_m: np.ndarray) -> np.ndarray:
        """(I, m, ...) values of a field."""
        parts = []
        for (begin, end), segment, maps in _runs(crops_m, self.segments, self._maps):
            local = crops_m[begin:end] - segment.first
            parts.append(maps[field][rows_I[:, None], local[None, :]])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _runs(crops_m: np.ndarray, segments: Sequence[Segment], maps: list) -> list:
    """Consecutive crops of one segment: ((begin, end) within crops_m, segment, its maps)."""
    bounds = np.array([segment.first for segment in segments])
    which = np.searchsorted(bounds, crops_m, side="right") - 1
    cuts = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(crops_m)]
    return [((a, b), segments[which[a]], maps[which[a]]) for a, b in itertools.pairwise(cuts)]


class CropReader:
    """Boxes, flips and colour jitter of recorded crops."""

    def __init__(
        self,
        store: Store,
        segments: Sequence[Segment],
        cache_dir: Path,
        on_images: Progress = lambda count: None,
    ) -> None:
        self._hydrated = Hydrated(store, segments, cache_dir, on_images)

    def take(self, rows_I: np.ndarray, crops_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(box_Im4 uint16, flip_Im bool)."""
        box = self._hydrated.take("box", rows_I, crops_m)
        return box, self._hydrated.take("flip", rows_I, crops_m)

    @property
    def jittered(self) -> bool:
        """All rounds of a store follow one distribution."""
        return "jitter" in self._hydrated.segments[0].part.settings

    def jitter(self, rows_I: np.ndarray, crops_m: np.ndarray) -> np.ndarray:
        """float32 (I, m, 4): brightness, contrast, saturation, hue."""
        return self._hydrated.take("jitter", rows_I, crops_m)


class SparseReader:
    """Labels of form `topk` or `hard`, as a target asks for them."""

    def __init__(
        self,
        store: Store,
        segments: Sequence[Segment],
        cache_dir: Path,
        on_images: Progress = lambda count: None,
    ) -> None:
        settings = segments[0].part.settings
        self.form = labels.parse_form(settings["form"])
        self.classes = int(settings["classes"])
        self._hydrated = Hydrated(store, segments, cache_dir, on_images)

    def take(self, rows_I: np.ndarray, crops_m: np.ndarray, target: Target) -> SparseLabels:
        """B = I * m rows, image-major."""
        ids = self._hydrated.take("ids", rows_I, crops_m).reshape(-1, self.form.k)
        prob = np.ones((len(ids), 1), dtype=np.float32)
        if self.form.kind == "topk":
            name = "stick" if self.form.compact else "prob"
            stored = self._hydrated.take(name, rows_I, crops_m).reshape(-1, self.form.k)
            prob = labels.decode_probabilities(self.form, stored)
        return labels.sparse_target(target, ids, prob, self.classes)


class WideReader:
    """Wide fields, streamed: the crop groups that a few crops of a unit's images lie in."""

    def __init__(self, store: Store, segments: Sequence[Segment], field: str) -> None:
        self.store, self.segments, self.field_name = store, segments, field
        self._arrays = [cache._arrays_for(store, segment.part) for segment in segments]

    def unit(self, unit: int, crops_m: np.ndarray) -> np.ndarray:
        """(images of the unit, m, ...) values.

        Raises:
            DamagedStoreError: a shard differs from what was committed.
        """
        parts = []
        for (begin, end), segment, arrays in _runs(crops_m, self.segments, self._arrays):
            local = crops_m[begin:end] - segment.first
            parts.append(self._take(segment, arrays, unit, local))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def units(self, units: Sequence[int], crops_m: np.ndarray) -> dict[int, np.ndarray]:
        """`unit` of several units; the next one is read while one is decoded."""
        with ThreadPoolExecutor(2, thread_name_prefix="wide") as pool:
            made = pool.map(lambda unit: self.unit(unit, crops_m), units)
            return dict(zip(units, made, strict=True))

    def _take(self, segment: Segment, arrays: Arrays, unit: int, local_m: np.ndarray) -> np.ndarray:
        field = segment.part.field(self.field_name)
        span = min(self.store.group_size, segment.count)
        blocks = {}
        for group in np.unique(local_m // span).tolist():
            key = schema.shard_key(segment.part.path, field, unit, group)
            shards = {key: self.store.read_checked(key, segment.manifest.files, unit)}
            crops = slice(group * span, min((group + 1) * span, segment.count))
            region = (self.store.unit_rows(unit), crops)
            blocks[group] = arrays.decode(f"{segment.part.path}/{field.name}", region, shards)
        if len(blocks) == 1:
            ((group, block),) = blocks.items()
            return block[:, local_m - group * span]
        return np.stack([blocks[c // span][:, c % span] for c in local_m.tolist()], axis=1)


def label_form(segments: Sequence[Segment]) -> Form:
    """The form the segments of a source share (a source has one form)."""
    return labels.parse_form(segments[0].part.settings["form"])


def check_temperature(segments: Sequence[Segment], asked: float | None) -> float:
    """The factor a stored score is divided by to get labels at the temperature asked for.

    Raises:
        StoreMismatchError: the stored form fixes the temperature.
    """
    settings = segments[0].part.settings
    form = labels.parse_form(settings["form"])
    if form.kind == "logits":
        return 1.0 if asked is None else asked
    if asked is None or asked == settings["temperature"]:
        return 1.0
    if settings["temperature"] is None:
        raise StoreMismatchError(
            f"these labels were imported and their temperature is unknown, so they cannot be "
            f"turned to {asked:g}. Leave it out to take them as they are.",
            code="temperature",
        )
    stored = float(settings["temperature"])
    if form.kind == "full" and len(settings["teachers"]) == 1:
        return asked / stored
    raise StoreMismatchError(
        f"these labels were made at temperature {stored:g} and form {form}"
        f"{' of several teachers' if form.kind == 'full' else ''} cannot be turned to "
        f"{asked:g}. Generate with --form logits to choose it at training time.",
        code="temperature",
    )
