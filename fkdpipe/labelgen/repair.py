"""Repair broken units: find them by checksum, and make them again as their markers record."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from fkdpipe.common.errors import DamagedStoreError, StoreError
from fkdpipe.labelgen.plan import Plan, image_columns
from fkdpipe.pixels import images
from fkdpipe.storage import commits, verify, writer
from fkdpipe.storage import repair as store_repair
from fkdpipe.storage.claims import Claim
from fkdpipe.storage.location import Location
from fkdpipe.storage.store import IMAGES, Part, Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A store whose records have been repaired.

    Attributes:
        records: those that were restored from their copies.
        broken: (part path, unit) that only a teacher can make again.
    """

    records: tuple[str, ...]
    broken: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Withdrawn:
    """Units that will be made again.

    Attributes:
        units: (part path, unit) whose commits are withdrawn.
        left: broken units of other parts, which another teacher made; their commits are kept.
        batch_of: the teacher batch that each unit was made with, if it is known.
    """

    units: tuple[tuple[str, int], ...]
    left: tuple[tuple[str, int], ...]
    batch_of: dict[tuple[str, int], int]


@dataclass(frozen=True)
class Repaired:
    """The result of a repair: records restored, (part path, unit) made again, and still broken."""

    records: tuple[str, ...]
    units: tuple[tuple[str, int], ...]
    left: tuple[tuple[str, int], ...]


def restore(location: Location, data: Path) -> Restored:
    """Repair records and the list of images, and find the broken units.

    Args:
        data: the image folder, needed if the list of images itself is damaged.

    Raises:
        StoreError: the damage cannot be repaired.
        ClaimedError: another process is writing to the store.
    """
    if next(iter(location.list("commits")), None) is None:
        Store(location)  # raises: there is no store
    with Claim(location, 0, 1):
        records = store_repair.metadata(location)
        store = Store(location)
        records += store_repair.records(store)
        problems = verify.verify(store, full=True)
        if any(problem.part == IMAGES for problem in problems):
            records += _images(store, data)
    broken = {(p.part, p.unit) for p in problems if p.unit >= 0 and p.part != IMAGES}
    return Restored(tuple(records), tuple(sorted(broken)))


def withdraw(plan: Plan, restored: Restored) -> Withdrawn:
    """Withdraw the commits of a plan's broken units, so that `generate` makes them again.

    Raises:
        ClaimedError: another process is writing to the store.
    """
    store, ours = plan.store, {part.path for part in plan.parts}
    units = tuple((path, unit) for path, unit in restored.broken if path in ours)
    batch_of = {}
    with Claim(store.location, 0, 1):
        for path, unit in units:
            facts = _facts(store, store.part(path), unit)
            if "batch" in facts:
                batch_of[path, unit] = int(facts["batch"])
        for path, unit in units:
            store.location.delete(commits.manifest_key(path))
            store.location.delete(commits.marker_key(path, unit))
            log.info("making %s unit %d again", path, unit)
    return Withdrawn(units, tuple(sorted({*restored.broken} - {*units})), batch_of)


def _facts(store: Store, part: Part, unit: int) -> dict:
    """`Marker.facts` of a unit, from its marker or else from the manifest."""
    marker = store.marker(part, unit)
    if marker is not None:
        return marker.facts
    try:
        manifest = store.manifest(part)
    except DamagedStoreError:
        return {}
    return manifest.facts.get(unit, {}) if manifest is not None else {}


def _images(store: Store, data: Path) -> list[str]:
    """Write the list of images again from the folder; it must equal what was committed."""
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
