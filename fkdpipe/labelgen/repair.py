"""Making broken units again: found by checksums, made with what their markers record."""

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
    """A store whose records are right again.

    Attributes:
        records: those that were put right from their copies.
        broken: (part path, unit) that only a teacher can make again.
    """

    records: tuple[str, ...]
    broken: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Withdrawn:
    """What a generation makes again.

    Attributes:
        units: (part path, unit) whose commits are withdrawn.
        left: broken ones of other parts, which another teacher made; their commits stay.
        batch_of: the teacher batch each unit was made with, where that is known.
    """

    units: tuple[tuple[str, int], ...]
    left: tuple[tuple[str, int], ...]
    batch_of: dict[tuple[str, int], int]


@dataclass(frozen=True)
class Repaired:
    """What a repair did: records restored, (part path, unit) made again, and still broken."""

    records: tuple[str, ...]
    units: tuple[tuple[str, int], ...]
    left: tuple[tuple[str, int], ...]


def restore(location: Location, data: Path) -> Restored:
    """Put records and the list of images right, and find the units that are broken.

    Args:
        data: the image folder, needed when the list of images itself is damaged.

    Raises:
        StoreError: what is broken cannot be put right from here.
        ClaimedError: another process writes the store.
    """
    if next(iter(location.list("commits")), None) is None:
        Store(location)  # says that there is none
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
    """Take back the commits of broken units that a plan makes; `generate` makes them again.

    Raises:
        ClaimedError: another process writes the store.
    """
    store, ours = plan.store, {part.path for part in plan.parts}
    units = tuple(place for place in restored.broken if place[0] in ours)
    batch_of = {}
    with Claim(store.location, 0, 1):
        for path, unit in units:
            made = _made(store, store.part(path), unit)
            if "batch" in made:
                batch_of[path, unit] = int(made["batch"])
        for path, unit in units:
            store.location.delete(commits.manifest_key(path))
            store.location.delete(commits.marker_key(path, unit))
            log.info("%s unit %d is made again", path, unit)
    return Withdrawn(units, tuple(sorted({*restored.broken} - {*units})), batch_of)


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
