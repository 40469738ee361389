"""Beginning a store and its parts: whoever comes first decides what is made there.

A group's zarr.json is created, never replaced, so that two processes started by mistake with
different settings cannot write over one another.
"""

from __future__ import annotations

import json

from fkdpipe.common.errors import DamagedStoreError, StoreError, StoreMismatchError
from fkdpipe.storage import commits, schema
from fkdpipe.storage.arrays import Arrays
from fkdpipe.storage.location import PARTIAL, Location
from fkdpipe.storage.schema import Json
from fkdpipe.storage.store import IMAGES, Store


def find_store(location: Location) -> Store | None:
    """The store there; None where there is none, or where its list of images was never finished.

    Raises:
        StoreError: something else is there; says what.
        DamagedStoreError: the list was finished, and its records are missing or broken. To begin
            anew would put another list beside the labels.
    """
    key = commits.marker_key(IMAGES, 0)
    if location.length(key) is not None:
        store = Store(location)
        if IMAGES not in store.parts or store.marker(store.part(IMAGES), 0) is None:
            raise store.damaged(key, "does not say what is in the list of images")
        return store
    if location.length("zarr.json") is not None:
        return None
    for key, _ in location.list():
        if not key.startswith(("images/", "commits/")) and not key.endswith(PARTIAL):
            raise StoreError(
                f"{location.url} is not empty and holds no store ({key} is there). Name a new "
                "folder.",
                code="not-empty",
            )
    return None


def first(location: Location, key: str, data: bytes) -> bytes:
    """Write the zarr.json of a group, which decides what is made here: whoever comes first does.

    Returns:
        What is there now: ours, or one that was begun with the same settings.

    Raises:
        StoreMismatchError: another was begun here. DamagedStoreError: what is there is broken.
    """
    if location.create(key, data):
        return data
    there = location.read(key)
    try:
        changed = schema.differences(_deciding(there), _deciding(data))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedStoreError(
            f"{location.url}: {key} cannot be read. `fkdpipe generate ... --repair` restores it.",
        ) from None
    if changed:
        raise StoreMismatchError(
            f"{location.url}: {key} was begun with other settings: {'; '.join(changed)}. Take the "
            "old settings, or another store.",
            code="settings",
        )
    return there


def write_metadata(location: Location, part: str, arrays: Arrays) -> None:
    """Write a part's zarr.json files, and last its record with a copy of each. The group's own
    comes first and decides; equal groups have equal arrays, so it does no harm when two processes
    start the same part at once."""
    everything = arrays.metadata()
    own = "zarr.json" if part == IMAGES else f"{part}/zarr.json"
    metadata = {own: first(location, own, everything.pop(own)).decode()}
    for key, data in sorted(everything.items()):
        if key == "zarr.json":
            continue  # the root group belongs to `images`
        there = read_or_none(location, key)
        if there is not None and part != IMAGES and not key.startswith(part):
            data = there  # a group above, shared with other parts
        elif there != data:
            location.write(key, data)
        metadata[key] = data.decode()
    location.write(commits.part_key(part), commits.seal_record({"metadata": metadata}))


def read_or_none(location: Location, key: str) -> bytes | None:
    try:
        return location.read(key)
    except FileNotFoundError:
        return None


def _deciding(group: bytes) -> Json:
    """What two starts of a group must agree on."""
    facts = json.loads(group)["attributes"][schema.ATTRIBUTE]
    return {k: v for k, v in facts.items() if k not in ("made_by", "provenance")}
