"""Repair records, which needs no teacher: each is stored twice, so one copy restores the other.

    broken                restored from
    zarr.json             the copy in part.json
    part.json             the zarr.json files
    a unit's marker       the manifest
    manifest              the markers

Shards cannot be restored; `fkdpipe.labelgen.repair` regenerates their units.
"""

from __future__ import annotations

from fkdpipe.storage import commits
from fkdpipe.storage.commits import BrokenRecordError, Manifest, Marker
from fkdpipe.storage.location import Location
from fkdpipe.storage.store import IMAGES, Part, Store


def metadata(location: Location) -> list[str]:
    """Restore zarr.json files and part records; returns the keys that were written."""
    keys = {key for key, _ in location.list()}
    parts = {
        key.removeprefix("commits/").rsplit("/", 1)[0]
        for key in keys
        if key.startswith("commits/") and not key.startswith("commits/claims/")
    }
    written = []
    for part in sorted(parts):
        try:
            body = commits.open_record(location.read(commits.part_key(part)))
        except (FileNotFoundError, BrokenRecordError):
            texts = {
                key: location.read(key).decode("utf-8", "replace")
                for key in sorted(keys)
                if _belongs(key, part)
            }
            location.write(commits.part_key(part), commits.seal_record({"metadata": texts}))
            written.append(commits.part_key(part))
            continue
        for key, text in body["metadata"].items():
            if key not in keys or location.read(key) != text.encode():
                location.write(key, text.encode())
                written.append(key)
    return written


def _belongs(key: str, part: str) -> bool:
    """Is this a zarr.json that the record of a part holds a copy of?"""
    if not key.endswith("zarr.json"):
        return False
    folder = key.removesuffix("zarr.json").rstrip("/")
    inside = folder == part or folder.startswith(f"{part}/")
    above = bool(folder) and part.startswith(f"{folder}/")
    return inside or above or (not folder and part == IMAGES)


def records(store: Store) -> list[str]:
    """Restore markers and manifests from one another; returns the keys that were written."""
    written = []
    for part in store.parts.values():
        manifest = _manifest(store, part)
        for unit in range(store.units_of(part)):
            key = commits.marker_key(part.path, unit)
            if manifest is not None:
                marker = _from_manifest(store, part, manifest, unit)
                if marker is not None and _read(store, key) != marker.to_bytes():
                    store.location.write(key, marker.to_bytes())
                    written.append(key)
        if manifest is None:
            key = commits.manifest_key(part.path)
            markers = {unit: m for unit, m in store.markers(part) if m is not None}
            if len(markers) == store.units_of(part):
                data = commits.manifest_of(part.path, part.settings_digest, markers).to_bytes()
                store.location.write(key, data)
                written.append(key)
            else:
                store.location.delete(key)  # broken, if it exists; the part must be finished again
    return written


def _manifest(store: Store, part: Part) -> Manifest | None:
    data = _read(store, commits.manifest_key(part.path))
    try:
        manifest = None if data is None else commits.manifest_from(data)
    except BrokenRecordError:
        return None
    same = manifest is not None and manifest.part == part.path
    return manifest if same and manifest.settings == part.settings_digest else None  # type: ignore[union-attr]


def _from_manifest(store: Store, part: Part, manifest: Manifest, unit: int) -> Marker | None:
    """A unit's marker, rebuilt from the manifest; None if it does not match the checksum there."""
    rows = store.unit_rows(unit)
    everything = part.kind == "images"
    prefixes = tuple(f"{part.path}/{field.name}/c/{unit}/" for field in part.fields)
    marker = Marker(
        part=part.path,
        unit=unit,
        settings=part.settings_digest,
        files={k: v for k, v in manifest.files.items() if everything or k.startswith(prefixes)},
        failed={r: why for r, why in manifest.failed.items() if rows.start <= r < rows.stop},
        facts=manifest.facts.get(unit, {}),
    )
    entry = manifest.markers.get(str(unit))
    return marker if entry == commits.entry(marker.to_bytes()) else None


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.location.read(key)
    except FileNotFoundError:
        return None
