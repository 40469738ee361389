"""Start a store and its parts: the first writer decides their settings.

A group's zarr.json is created and never replaced, so two processes started by mistake with
different settings cannot overwrite each other.
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
    """The store at a location; None if there is none, or its list of images was never finished.

    Raises:
        StoreError: the location holds something else; the message names it.
        DamagedStoreError: the list was finished, but its records are missing or broken. Starting
            over would put another list beside the labels.
    """
    key = commits.marker_key(IMAGES, 0)
    if location.length(key) is not None:
        store = Store(location)
        if IMAGES not in store.parts or store.marker(store.part(IMAGES), 0) is None:
            raise store.damaged(key, "does not describe the list of images")
        return store
    if location.length("zarr.json") is not None:
        return None
    for key, _ in location.list():
        if not key.startswith(("images/", "commits/")) and not key.endswith(PARTIAL):
            raise StoreError(
                f"{location.url} is not empty and holds no store ({key} is there). Choose a new "
                "folder.",
                code="not-empty",
            )
    return None


def first(location: Location, key: str, data: bytes) -> bytes:
    """Create the zarr.json of a group unless it exists; the first writer decides the settings.

    Returns:
        The content that is now stored: `data`, or one with the same settings.

    Raises:
        StoreMismatchError: it exists with other settings. DamagedStoreError: it exists, broken.
    """
    if location.create(key, data):
        return data
    existing = location.read(key)
    try:
        changed = schema.differences(_deciding(existing), _deciding(data))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedStoreError(
            f"{location.url}: {key} cannot be read. `fkdpipe generate ... --repair` restores it.",
        ) from None
    if changed:
        raise StoreMismatchError(
            f"{location.url}: {key} was started with other settings: {'; '.join(changed)}. Use "
            "the old settings, or another store.",
            code="settings",
        )
    return existing


def write_metadata(location: Location, part: str, arrays: Arrays) -> None:
    """Write a part's zarr.json files, then its record with a copy of each.

    The group's own file is written first and decides the settings. Equal groups have equal arrays,
    so two processes may start the same part at once.
    """
    everything = arrays.metadata()
    own = "zarr.json" if part == IMAGES else f"{part}/zarr.json"
    metadata = {own: first(location, own, everything.pop(own)).decode()}
    for key, data in sorted(everything.items()):
        if key == "zarr.json":
            continue  # the root group belongs to `images`
        existing = read_or_none(location, key)
        if existing is not None and part != IMAGES and not key.startswith(part):
            data = existing  # a group above, shared with other parts
        elif existing != data:
            location.write(key, data)
        metadata[key] = data.decode()
    location.write(commits.part_key(part), commits.seal_record({"metadata": metadata}))


def read_or_none(location: Location, key: str) -> bytes | None:
    try:
        return location.read(key)
    except FileNotFoundError:
        return None


def _deciding(group: bytes) -> Json:
    """The attributes of a group that two runs must agree on."""
    facts = json.loads(group)["attributes"][schema.ATTRIBUTE]
    return {k: v for k, v in facts.items() if k not in ("made_by", "provenance")}
