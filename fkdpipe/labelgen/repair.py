"""Making broken units again: found by checksums, made with what their markers record."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fkdpipe import images
from fkdpipe.errors import DamagedStoreError, StoreError
from fkdpipe.labelgen.plan import image_columns
from fkdpipe.storage import commits, mend, verify, writer
from fkdpipe.storage.location import Location
from fkdpipe.storage.store import IMAGES, Part, Store
from fkdpipe.storage.verify import Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Broken:
    """What a repair found.

    Attributes:
        restored: records that were put right from their copies.
        units: (part path, unit) that have to be made again.
        batch_of: the teacher batch each was made with, where that is known.
    """

    restored: tuple[str, ...]
    units: tuple[tuple[str, int], ...]
    batch_of: dict[tuple[str, int], int]


def prepare(location: Location, data: Path) -> Broken:
    """Restore records and the list of images, and withdraw the commits of broken units.

    After it, an ordinary `generate` with the same settings makes what is missing.

    Args:
        data: the image folder, needed when the list of images itself is damaged.

    Raises:
        StoreError: what is broken cannot be put right from here.
    """
    restored = mend.metadata(location)
    store = Store(location)
    restored += mend.records(store)
    problems = verify.verify(store, full=True)
    if any(problem.part == IMAGES for problem in problems):
        restored += _images(store, data)
    units, batch_of = _withdraw(store, problems)
    for path, unit in units:
        log.info("%s unit %d is made again", path, unit)
    return Broken(tuple(restored), tuple(units), batch_of)


def _withdraw(
    store: Store, problems: Sequence[Problem]
) -> tuple[list[tuple[str, int]], dict[tuple[str, int], int]]:
    broken = sorted({(p.part, p.unit) for p in problems if p.unit >= 0 and p.part != IMAGES})
    batch_of = {}
    for path, unit in broken:
        part = store.part(path)
        made = _made(store, part, unit)
        if "batch" in made:
            batch_of[path, unit] = int(made["batch"])
    for path, unit in broken:
        store.location.delete(commits.manifest_key(path))
        store.location.delete(commits.marker_key(path, unit))
    return broken, batch_of


def _made(store: Store, part: Part, unit: int) -> dict:
    marker = store.marker(part, unit)
    if marker is not None:
        return marker.made
    try:
        manifest = store.manifest(part)
    except DamagedStoreError:
        return {}
    return manifest.made.get(unit, {}) if manifest is not None else {}


def _images(store: Store, data: Path) -> list[str]:
    """Write the list of images again from the folder; it must come out as it was committed."""
    part = store.part(IMAGES)
    marker = store.marker(part, 0)
    folder = images.scan(data, need_classes=False)
    shards = writer.image_shards(
        store.arrays, image_columns(folder), int(store.facts["order_seed"])
    )
    if marker is None or any(commits.entry(d) != marker.files.get(k) for k, d in shards.items()):
        raise StoreError(
            f"{store.url}: its list of images is damaged, and {data} no longer holds the images it "
            "was made from, so it cannot be written again.",
            code="images-lost",
        )
    written = []
    for key, data_ in shards.items():
        try:
            intact = commits.entry(store.location.read(key)) == marker.files[key]
        except FileNotFoundError:
            intact = False
        if not intact:
            store.location.write(key, data_)
            written.append(key)
    return written
