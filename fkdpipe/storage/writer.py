"""Fill a store, one unit at a time; a unit is complete or absent.

A unit's shards are encoded in memory, written and flushed to disk, read back, and only then
committed by a marker. When the last unit of a part is committed, a manifest seals it. Nothing here
depends on the number of processes: each commits its own units, and the last one seals the part.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from fkdpipe.common.errors import DamagedStoreError, StoreMismatchError
from fkdpipe.pixels import crops
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import begin, commits, process, schema
from fkdpipe.storage.arrays import Arrays
from fkdpipe.storage.claims import STALE_SECONDS
from fkdpipe.storage.commits import Marker
from fkdpipe.storage.location import PARTIAL, Location
from fkdpipe.storage.rounds import fields_of
from fkdpipe.storage.schema import Field, Json
from fkdpipe.storage.settings import (
    CropsSettings,
    FeatureSettings,
    ImagesSettings,
    LabelSettings,
    Settings,
)
from fkdpipe.storage.store import IMAGES, Part, Store

P = TypeVar("P", bound=CropsSettings | LabelSettings | FeatureSettings)


@dataclass(frozen=True)
class ImageColumns:
    """The list of images to store: one row per image, in any order.

    Attributes:
        class_N: int32, -1 without classes. size_N2: uint16 (height, width). bytes_N: int64.
        rejected: (key, reason, detail) of files left out.
        fingerprint: of the image folder (`fkdpipe.pixels.images.fingerprint`).
    """

    keys: Sequence[str]
    class_N: np.ndarray
    size_N2: np.ndarray
    bytes_N: np.ndarray
    class_names: Sequence[str]
    rejected: Sequence[tuple[str, str, str]]
    fingerprint: str


def create_store(
    location: Location,
    columns: ImageColumns,
    *,
    seed: int,
    unit: int,
    group: int = schema.GROUP_CROPS,
) -> Store:
    """Create a store with a list of images and no rounds, or open one with the same list.

    Images are put into a random order that depends only on `seed` and their keys, so that units
    hold all classes alike.

    Args:
        seed: of the order. unit: U, images per unit. group: g, crops per crop group.

    Raises:
        StoreMismatchError: the location holds a store of other images or in another order.
        StoreError, DamagedStoreError: as `begin.find_store`.
    """
    fields = schema.image_fields()
    values = _image_values(columns, seed)
    rows = {field.name: len(values[field.name]) for field in fields}
    root = {
        "format": schema.FORMAT,
        "version": schema.FORMAT_VERSION,
        "images": len(columns.keys),
        "unit": unit,
        "group": group,
        "fingerprint": columns.fingerprint,
        "order_seed": seed,
        "made_by": package_versions(),
    }
    arrays = Arrays()
    arrays.add_group("", {schema.ATTRIBUTE: root})
    begin.first(location, "zarr.json", arrays.metadata()["zarr.json"])
    store = begin.find_store(location)
    if store is not None:
        return store
    settings = ImagesSettings(columns.fingerprint, seed, rows)
    facts = _part_facts(-1, "", "", settings, {}, fields)
    arrays.add_group(IMAGES, {schema.ATTRIBUTE: facts})
    for field in fields:
        shape = schema.array_settings(field, rows=rows[field.name], crops=0, unit=unit, group=group)
        arrays.add_array(f"{IMAGES}/{field.name}", shape)
    begin.write_metadata(location, IMAGES, arrays)
    shards = image_shards(arrays, columns, seed)
    files = {key: _write_and_read_back(location, key, data) for key, data in shards.items()}
    marker = Marker(IMAGES, 0, schema.digest(settings.to_json()), files, {}, {})
    location.write(commits.marker_key(IMAGES, 0), marker.to_bytes())
    store = Store(location)
    seal(store, store.part(IMAGES))
    return store


def image_shards(arrays: Arrays, columns: ImageColumns, seed: int) -> dict[str, bytes]:
    """The objects of `images`, key to bytes; equal lists give equal bytes."""
    shards: dict[str, bytes] = {}
    for name, column in _image_values(columns, seed).items():
        if len(column):
            shards |= arrays.encode(f"{IMAGES}/{name}", (slice(0, len(column)),), column)
    return shards


def _image_values(columns: ImageColumns, seed: int) -> dict[str, np.ndarray]:
    order = crops.random_order(seed, crops.image_ids(columns.keys))
    values: dict[str, np.ndarray] = {
        "key": np.array(columns.keys, dtype=object)[order],
        "class": columns.class_N[order],
        "size": columns.size_N2[order],
        "bytes": columns.bytes_N[order],
        "class_name": np.array(list(columns.class_names), dtype=object),
    }
    for index, name in enumerate(("rejected_key", "rejected_reason", "rejected_detail")):
        values[name] = np.array([row[index] for row in columns.rejected], dtype=object)
    return values


def add_crops(
    store: Store, distribution: CropDistribution, *, seed: int, count: int, derived: bool = False
) -> Part[CropsSettings]:
    """Start a round of `count` more crops of every image.

    Raises:
        StoreMismatchError: earlier rounds were drawn from another distribution or seed.
    """
    rounds = store.rounds()
    first = sum(part.settings.crops for part in rounds)
    settings = CropsSettings.of(distribution, seed=seed, first=first, count=count, derived=derived)
    for part in rounds:
        changed = schema.differences(
            replace(part.settings, first=first, crops=count).to_json(), settings.to_json()
        )
        if changed:
            raise StoreMismatchError(
                f"{store.url} was drawn from another distribution: {'; '.join(changed)}.",
                code="settings",
            )
    fields = [] if derived else fields_of(settings)
    return add_part(store, f"rounds/{len(rounds)}/crops", settings, fields)


def add_part(
    store: Store,
    path: str,
    settings: P,
    fields: Sequence[Field],
    *,
    provenance: Json | None = None,
) -> Part[P]:
    """Start a part, or return it if it was started with the same settings.

    Args:
        path: of the part in the store. settings: what two runs must agree on.
        provenance: recorded by the first run.

    Raises:
        StoreMismatchError: it was started with other settings; says which.
    """
    if path in store.parts:
        changed = schema.differences(store.part(path).settings.to_json(), settings.to_json())
        if changed:
            raise StoreMismatchError(
                f"{store.url}: {path} was made with other settings: {'; '.join(changed)}. Use "
                "the old settings to finish it, another --source name to add labels beside it, "
                "or another store.",
                code="settings",
            )
        return store.part(path)
    words = path.split("/")
    source = words[3] if len(words) > 3 else ""
    layer = words[4] if len(words) > 4 else ""
    facts = _part_facts(int(words[1]), source, layer, settings, provenance or {}, fields)
    arrays = Arrays()
    arrays.add_group(path, {schema.ATTRIBUTE: facts})
    for field in fields:
        arrays.add_array(
            f"{path}/{field.name}",
            schema.array_settings(
                field,
                rows=store.num_images,
                crops=settings.crops,
                unit=store.unit_size,
                group=min(store.group_size, settings.crops),
            ),
        )
    begin.write_metadata(store.location, path, arrays)
    store.refresh()
    return store.part(path)


def commit_unit(
    store: Store,
    part: Part,
    unit: int,
    values: Mapping[str, np.ndarray],
    *,
    failed: Mapping[int, tuple[str, str]] | None = None,
    facts: Json | None = None,
) -> Marker:
    """Write a unit's arrays, read them back, and commit them.

    Args:
        values: field name to (images of the unit, M, ...); rows of failed images hold fill values.
        failed: row within the store to (code, detail).
        facts: batch, device and whatever else is recorded per unit (`Marker.facts`).

    Raises:
        StoreError: the location cannot be written.
        DamagedStoreError: the data read back differ from what was written.
    """
    rows = store.unit_rows(unit)
    files: commits.FileTable = {}
    for field in part.fields:
        for region in _regions(field, rows, values[field.name].shape[1], store.group_size):
            data = np.asarray(values[field.name][:, region[1]])
            shards = store.arrays.encode(f"{part.path}/{field.name}", region, data)
            assert len(shards) == 1, f"{part.path}/{field.name} {region} is not one whole shard"
            for key, blob in shards.items():
                files[key] = _write_and_read_back(store.location, key, blob)
    marker = Marker(
        part.path, unit, part.settings_digest, files, dict(failed or {}), dict(facts or {})
    )
    store.location.write(commits.marker_key(part.path, unit), marker.to_bytes())
    return marker


def fill_rows(field: Field, images: int, crops_M: int) -> np.ndarray:
    """An array of fill values for a unit's field."""
    return np.full((images, crops_M, *field.shape), field.fill, dtype=field.dtype)


def seal(store: Store, part: Part) -> bool:
    """Write the manifest if every unit is committed; returns whether the part is sealed.

    Raises:
        DamagedStoreError: a committed file is missing or has another length; nothing is sealed.
    """
    markers: dict[int, Marker] = {}
    for unit, marker in store.markers(part):
        if marker is None:
            return False
        markers[unit] = marker
    lengths = dict(store.location.list(part.path))
    for unit, marker in markers.items():
        for key, (length, _) in marker.files.items():
            if lengths.get(key) != length:
                raise DamagedStoreError(
                    f"{store.url}: {key} (unit {unit}) was removed or changed after it was "
                    "committed. Run the same `fkdpipe generate` again: it makes that unit again.",
                    unit=unit,
                )
    data = commits.manifest_of(part.path, part.settings_digest, markers).to_bytes()
    key = commits.manifest_key(part.path)
    if begin.read_or_none(store.location, key) != data:
        store.location.write(key, data)
    return True


def committed_units(store: Store, part: Part, units: Iterable[int]) -> set[int]:
    """Units with a valid marker whose files all exist with the recorded length."""
    done = set()
    for unit in units:
        marker = store.marker(part, unit)
        if marker is not None and all(
            store.location.length(key) == length for key, (length, _) in marker.files.items()
        ):
            done.add(unit)
    return done


def sweep(store: Store, index: int, world: int) -> int:
    """Remove partial files that killed writers left behind; returns how many.

    The caller holds the claim of part `index` of `world`, so no other process writes its units.
    Part 0 also removes partial files of no unit, if their writer has exited: another process may be
    starting a part.
    """
    swept = 0
    for key, _ in list(store.location.list()):
        if key.endswith(PARTIAL):
            unit = re.search(r"/c/(\d+)/|/(\d+)\.json\.", key)
            owner = int(unit[1] or unit[2]) % world if unit else 0
            if owner == index and (unit or _abandoned(store.location, key)):
                store.location.delete(key)
                swept += 1
    return swept


def _abandoned(location: Location, key: str) -> bool:
    """Has the writer of a partial file exited (this machine) or been silent for long (others)?"""
    name = re.search(r"\.([0-9a-f]{8})-(\d+)\.partial$", key)
    if name and name[1] == process.machine():
        return process.started(int(name[2])) is None
    age = location.age_seconds(key)
    return age is not None and age >= STALE_SECONDS


def package_versions() -> Json:
    """Versions of the packages that determine what a store holds."""
    names = ("fkdpipe", "numpy", "zarr", "numcodecs", "torch", "torchvision", "timm")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _part_facts(
    round_: int,
    source: str,
    layer: str,
    settings: Settings,
    provenance: Json,
    fields: Sequence[Field],
) -> Json:
    return {
        "kind": settings.kind,
        "round": round_,
        "source": source,
        "tap": layer,
        "settings": settings.to_json(),
        "provenance": provenance,
        "fields": [field.to_json() for field in fields],
    }


def _regions(field: Field, rows: slice, crops_M: int, group: int) -> list[tuple[slice, slice]]:
    """Whole shards of a unit: one for a narrow field, one per crop group for a wide one."""
    span = min(group, crops_M) if field.wide else crops_M
    return [(rows, slice(k, min(k + span, crops_M))) for k in range(0, crops_M, span)]


def _write_and_read_back(location: Location, key: str, data: bytes) -> tuple[int, str]:
    location.write(key, data)
    expected = commits.entry(data)
    if commits.entry(location.read(key)) != expected:
        raise DamagedStoreError(
            f"{location.url}: {key} does not read back as written. Check the disk.",
            code="write-back",
        )
    return expected
