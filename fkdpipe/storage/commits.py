"""Commit records: markers and manifests, which say what is complete, and claims of writers.

Everything lies under `commits/`, beside the arrays:

    commits/<part>/part.json       a copy of the part's zarr.json files
    commits/<part>/<unit>.json     marker: the unit is committed
    commits/<part>/manifest.json   every unit is committed; the part is sealed
    commits/claims/<i>-of-<n>.json who is writing

Records are JSON objects {"body": ..., "crc32c": ...}. The checksum is that of the canonical JSON of
the body, so that a damaged marker cannot pass for a valid one. Bodies hold no timestamps: equal
units have equal markers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import google_crc32c

from fkdpipe.storage.schema import Json, canonical

FileTable = dict[str, tuple[int, str]]  # key to (length in bytes, crc32 in hex)


class BrokenRecordError(ValueError):
    """A marker, manifest or part record whose checksum or shape is wrong."""


@dataclass(frozen=True)
class Marker:
    """A committed unit.

    Attributes:
        settings: digest of the part's settings.
        files: every object of the unit.
        failed: row within the store -> (code, detail) of images without labels.
        facts: how the unit was made, which may differ between units: batch, device, threads; of
            crops the checksum. Its key on disk is "made".
    """

    part: str
    unit: int
    settings: str
    files: FileTable
    failed: dict[int, tuple[str, str]]
    facts: Json

    def to_bytes(self) -> bytes:
        return seal_record(
            {
                "part": self.part,
                "unit": self.unit,
                "settings": self.settings,
                "files": self.files,
                "failed": {str(row): list(why) for row, why in self.failed.items()},
                "made": self.facts,
            }
        )


@dataclass(frozen=True)
class Manifest:
    """A sealed part: all its markers combined.

    Attributes:
        markers: length and checksum of every marker, by unit.
        files: of all units together.
        facts: `Marker.facts` by unit.
    """

    part: str
    settings: str
    markers: FileTable
    files: FileTable
    failed: dict[int, tuple[str, str]]
    facts: dict[int, Json]

    def to_bytes(self) -> bytes:
        return seal_record(
            {
                "part": self.part,
                "settings": self.settings,
                "markers": self.markers,
                "files": self.files,
                "failed": {str(row): list(why) for row, why in self.failed.items()},
                "made": {str(unit): facts for unit, facts in self.facts.items()},
            }
        )


def part_key(part: str) -> str:
    return f"commits/{part}/part.json"


def marker_key(part: str, unit: int) -> str:
    return f"commits/{part}/{unit}.json"


def manifest_key(part: str) -> str:
    return f"commits/{part}/manifest.json"


def crc(data: bytes) -> str:
    return f"{google_crc32c.value(data):08x}"


def entry(data: bytes) -> tuple[int, str]:
    """(length, crc32) of an object, as stored in file tables.

    This is zlib's CRC-32, not crc32c: each chunk of a shard ends with its own crc32c, and the
    crc32c of such data is the same number whatever the data are. It would detect a flipped bit, but
    could not tell apart two shards of the same lengths.
    """
    return len(data), f"{zlib.crc32(data):08x}"


def seal_record(body: Json) -> bytes:
    return canonical({"body": body, "crc32c": crc(canonical(body))})


def open_record(data: bytes) -> Json:
    """The body of a record.

    Raises:
        BrokenRecordError: not JSON, not of this shape, or its checksum is wrong.
    """
    try:
        record = json.loads(data)
        body, expected = record["body"], record["crc32c"]
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenRecordError("not a record of fkdpipe") from error
    if not isinstance(body, dict) or crc(canonical(body)) != expected:
        raise BrokenRecordError("its checksum is wrong")
    if canonical(record) != data:
        raise BrokenRecordError("not written by fkdpipe")
    return body


def marker_from(data: bytes) -> Marker:
    """Parse a marker; raises BrokenRecordError."""
    body = open_record(data)
    try:
        return Marker(
            part=body["part"],
            unit=int(body["unit"]),
            settings=body["settings"],
            files=_files(body["files"]),
            failed=_failed(body["failed"]),
            facts=body["made"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BrokenRecordError("not a marker") from error


def manifest_from(data: bytes) -> Manifest:
    """Parse a manifest; raises BrokenRecordError."""
    body = open_record(data)
    try:
        return Manifest(
            part=body["part"],
            settings=body["settings"],
            markers=_files(body["markers"]),
            files=_files(body["files"]),
            failed=_failed(body["failed"]),
            facts={int(unit): facts for unit, facts in body["made"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BrokenRecordError("not a manifest") from error


def manifest_of(part: str, settings: str, markers: Mapping[int, Marker]) -> Manifest:
    """Combine the markers of a part into its manifest, in order of unit."""
    files: FileTable = {}
    failed: dict[int, tuple[str, str]] = {}
    table: FileTable = {}
    for unit in sorted(markers):
        files |= markers[unit].files
        failed |= markers[unit].failed
        table[str(unit)] = entry(markers[unit].to_bytes())
    facts = {unit: markers[unit].facts for unit in sorted(markers)}
    return Manifest(part, settings, table, files, failed, facts)


def _files(table: Mapping[str, list]) -> FileTable:
    return {key: (int(length), str(checksum)) for key, (length, checksum) in table.items()}


def _failed(table: Mapping[str, list]) -> dict[int, tuple[str, str]]:
    return {int(row): (str(code), str(detail)) for row, (code, detail) in table.items()}
