"""Check a store against its records; each problem has a stable code and a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fkdpipe.common.errors import DamagedStoreError, StoreError
from fkdpipe.pixels.crops import boxes_outside
from fkdpipe.storage import cache, commits, labels, rounds
from fkdpipe.storage.commits import BrokenRecordError, Manifest, Marker
from fkdpipe.storage.location import PARTIAL
from fkdpipe.storage.store import IMAGES, Part, Store

CODES = {
    "no-record": "part.json, a zarr.json or a manifest is missing, damaged or foreign",
    "missing-unit": "a unit of a sealed part has no marker",
    "marker-changed": "a marker is damaged, of another unit, or differs from the sealed one",
    "missing-file": "an object of a committed unit is missing",
    "length": "an object has the wrong length",
    "unreadable": "an object exists but cannot be read",
    "checksum": "an object's checksum differs, or boxes differ from those committed",
    "unknown-file": "an object that is not in any commit record",
    "not-sealed": "the part is not finished",
    "box-outside": "a crop is empty or reaches outside its image",
    "id-range": "a class id exceeds the number of classes",
    "probability": "a probability is NaN or negative, or a sum is above 1",
    "unfilled": "a row has no value, but its image did not fail",
    "duplicate": "a key is listed twice, or a label has the same class twice",
    "cache": "the local cache has changed since it was filled",
    "teacher-differs": "the teacher gives different labels or features when it runs again",
    "image-missing": "an image of the list is not in the folder",
    "image-extra": "an image of the folder is not in the list",
    "image-changed": "an image file has another length",
}


@dataclass(frozen=True)
class Problem:
    """A problem of a store. unit: -1 if it does not concern a single unit."""

    code: str
    part: str
    unit: int
    detail: str

    def to_json(self) -> dict[str, object]:
        return {"code": self.code, "part": self.part, "unit": self.unit, "detail": self.detail}


def verify(
    store: Store,
    *,
    full: bool = False,
    cache_dir: Path | None = None,
    on_unit: Callable[[int], None] = lambda count: None,
) -> list[Problem]:
    """Compare a store with its records.

    Args:
        full: read every object, verify its checksum and check its values.
        cache_dir: with `full`, also check the store's local cache in this folder.
        on_unit: called with 1 after each unit of each part.
    """
    try:
        parts = list(store.parts.values())
    except DamagedStoreError as error:
        return [Problem("no-record", "", -1, str(error))]
    problems: list[Problem] = []
    known: set[str] = {"zarr.json"}
    for part in parts:
        known |= {commits.part_key(part.path), commits.manifest_key(part.path), *part.metadata}
        known |= {commits.marker_key(part.path, u) for u in range(store.units_of(part))}
        problems += _verify_part(store, part, known, full=full, on_unit=on_unit)
        if full and cache_dir is not None and part.kind != "images":
            problems += _verify_cache(store, part, cache_dir)
    problems += _unknown_files(store, known)
    if full:
        problems += _duplicate_keys(store)
    return problems


def _verify_part(
    store: Store, part: Part, known: set[str], *, full: bool, on_unit: Callable[[int], None]
) -> Iterator[Problem]:
    try:
        manifest = store.manifest(part)
    except DamagedStoreError as error:
        manifest = None
        yield Problem("no-record", part.path, -1, str(error))
    else:
        if manifest is None:
            yield Problem("not-sealed", part.path, -1, "some units are missing; generate the rest")
    for unit in range(store.units_of(part)):
        marker, problem = _marker(store, part, unit, manifest)
        if problem is not None:
            yield problem
        files = marker.files if marker is not None else _files_of(store, part, unit, manifest)
        known |= set(files)
        sound = True
        for key, expected in files.items():
            code = _compare(store, key, expected, full=full)
            if code is not None:
                sound = False
                yield Problem(code, part.path, unit, key)
        if full and sound and marker is not None:
            try:
                yield from _values(store, part, marker)
            except StoreError as error:
                yield Problem("no-record", part.path, unit, str(error))
        on_unit(1)


def _marker(
    store: Store, part: Part, unit: int, manifest: Manifest | None
) -> tuple[Marker | None, Problem | None]:
    key = commits.marker_key(part.path, unit)
    try:
        data = store.location.read(key)
    except FileNotFoundError:
        problem = Problem("missing-unit", part.path, unit, f"{key} is missing")
        return None, problem if manifest is not None else None
    try:
        marker = commits.marker_from(data)
    except BrokenRecordError as error:
        return None, Problem("marker-changed", part.path, unit, f"{key}: {error}")
    own = (marker.part, marker.unit, marker.settings) == (part.path, unit, part.settings_digest)
    if not own:
        return None, Problem("marker-changed", part.path, unit, f"{key} is of another unit")
    if manifest is not None and manifest.markers.get(str(unit)) != commits.entry(data):
        return None, Problem("marker-changed", part.path, unit, f"{key} differs from the manifest")
    return marker, None


def _files_of(store: Store, part: Part, unit: int, manifest: Manifest | None) -> commits.FileTable:
    """The files of a unit whose marker is missing, from the manifest."""
    if manifest is None:
        return {}
    prefix = tuple(f"{part.path}/{field.name}/c/{unit}/" for field in part.fields)
    return {key: value for key, value in manifest.files.items() if key.startswith(prefix)}


def _compare(store: Store, key: str, expected: tuple[int, str], *, full: bool) -> str | None:
    length = store.location.length(key)
    if length is None:
        return "missing-file"
    if length != expected[0]:
        return "length"
    try:
        same = not full or commits.entry(store.location.read(key)) == expected
    except FileNotFoundError:
        return "missing-file"
    except StoreError:
        return "unreadable"
    return None if same else "checksum"


def _values(store: Store, part: Part, marker: Marker) -> Iterator[Problem]:
    """Check a unit's values; its checksums match."""
    unit = marker.unit
    if part.kind == "crops":
        yield from _crop_values(store, part, marker)
    elif part.kind == "labels":
        yield from _label_values(store, part, marker)
    elif part.kind == "features":
        good = _good_rows(store, marker)
        for field in part.fields:
            values = store.read(part, field.name, unit, files=marker.files)[good]
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                yield Problem("unfilled", part.path, unit, f"{field.name} is not finite")


def _good_rows(store: Store, marker: Marker) -> np.ndarray:
    """bool (images of the unit,): those that did not fail."""
    rows = store.unit_rows(marker.unit)
    good = np.ones(rows.stop - rows.start, dtype=bool)
    good[[row - rows.start for row in marker.failed]] = False
    return good


def _crop_values(store: Store, part: Part, marker: Marker) -> Iterator[Problem]:
    unit = marker.unit
    if part.settings.derived:
        recorded, detail = rounds.draw(store, part, unit), "boxes cannot be derived again"
    else:
        recorded = rounds.crops_of(store, part, unit)
        detail = "boxes differ from those that were committed"
    if rounds.checksum(recorded) != marker.facts.get("crops_crc32c"):
        yield Problem("checksum", part.path, unit, detail)
    outside = boxes_outside(recorded.box_NM4, store.images.size_N2[store.unit_rows(unit)])
    outside[[row - store.unit_rows(unit).start for row in marker.failed]] = False
    if outside.any():
        yield Problem("box-outside", part.path, unit, f"{int(outside.sum())} crops")
    if recorded.jitter_NM4 is not None and not np.isfinite(recorded.jitter_NM4).all():
        yield Problem("unfilled", part.path, unit, "colour factors are not finite")


def _label_values(store: Store, part: Part, marker: Marker) -> Iterator[Problem]:
    unit, form, classes = marker.unit, part.settings.form, part.settings.classes
    good = _good_rows(store, marker)

    def read(name: str) -> np.ndarray:
        return store.read(part, name, unit, files=marker.files)[good]

    if not form.sparse:
        scores = read(form.value_field).astype(np.float32)
        if not np.isfinite(scores).all():
            yield Problem("unfilled", part.path, unit, "scores are not finite")
        elif form.kind == "full":
            total = np.exp(scores).sum(axis=-1)
            bound = 2 * labels.error_bound(form, classes) + 1e-3
            if (np.abs(total - 1) > bound).any():
                yield Problem("probability", part.path, unit, "rows do not sum to 1")
        return
    ids = read("ids")
    fill = int(np.iinfo(ids.dtype).max)
    if (ids == fill).any():
        yield Problem("unfilled", part.path, unit, f"{int((ids == fill).any(-1).sum())} crops")
    elif (ids >= classes).any():
        yield Problem("id-range", part.path, unit, f"class {int(ids.max())} of {classes}")
    elif form.k > 1 and (np.diff(np.sort(ids, axis=-1), axis=-1) == 0).any():
        yield Problem("duplicate", part.path, unit, "a label has the same class twice")
    if form.kind == "topk" and not form.compact:
        prob = read("prob").astype(np.float32)
        ceiling = 1 + form.k * 2.0**-11
        if not (np.isfinite(prob).all() and (prob >= 0).all() and (prob.sum(-1) <= ceiling).all()):
            yield Problem("probability", part.path, unit, "NaN, negative, or a sum above 1")


def _verify_cache(store: Store, part: Part, cache_dir: Path) -> Iterator[Problem]:
    try:
        manifest = store.manifest(part)
    except DamagedStoreError:
        return
    if manifest is None:
        return
    folder = cache.folder_of(cache_dir, part, manifest)
    if folder.is_dir():
        for what in cache.check(folder):
            yield Problem("cache", part.path, -1, f"{folder}: {what}")


def _unknown_files(store: Store, known: set[str]) -> Iterator[Problem]:
    for key, _ in store.location.list():
        if key in known or key.endswith(PARTIAL) or key.startswith("commits/claims/"):
            continue
        yield Problem("unknown-file", "", -1, key)


def _duplicate_keys(store: Store) -> Iterator[Problem]:
    try:
        keys = store.images.keys
    except StoreError as error:
        yield Problem("no-record", IMAGES, 0, str(error))
        return
    unique, counts = np.unique(keys.astype(str), return_counts=True)
    for key in unique[counts > 1].tolist():
        yield Problem("duplicate", IMAGES, 0, f"{key} is listed {int(counts.max())} times")
