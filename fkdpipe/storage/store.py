"""An opened store: its metadata, its list of images and its parts.

`reader` joins the rounds of a store for training, `writer` fills a store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

from fkdpipe.common import words
from fkdpipe.common.errors import DamagedStoreError, StoreError, UnsealedStoreError
from fkdpipe.storage import commits, schema, settings
from fkdpipe.storage.arrays import Arrays
from fkdpipe.storage.commits import BrokenRecordError, Manifest, Marker
from fkdpipe.storage.location import Location, open_location
from fkdpipe.storage.schema import Field, Json
from fkdpipe.storage.settings import CropsSettings, Kind, Settings

IMAGES = "images"
S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Part(Generic[S]):
    """A part of a store, which is written, committed and sealed as a whole.

    Attributes:
        path: "images", "rounds/0/crops", "rounds/0/labels/<source>", ...
        kind: "images", "crops", "labels" or "features".
        round: number of the round, -1 for `images`.
        source: name of the source, "" for images and crops.
        layer: "pre", "post" or "map" for features, else "".
        settings: what two runs must agree on; a class for each kind.
        provenance: what else is known about how it was made.
        fields: its arrays.
        metadata: its zarr.json files, as stored in its record.
    """

    path: str
    kind: Kind
    round: int
    source: str
    layer: str
    settings: S
    provenance: Json
    fields: tuple[Field, ...]
    metadata: dict[str, bytes]

    @cached_property
    def settings_digest(self) -> str:
        return schema.digest(self.settings.to_json())

    def field(self, name: str) -> Field:
        """Raises KeyError when the part has no such array."""
        return {field.name: field for field in self.fields}[name]


@dataclass(frozen=True)
class Images:
    """The store's list of images, in the store's order (a fixed random permutation).

    Attributes:
        keys: relative paths (`fkdpipe.pixels.images` writes and reads them).
        class_N: int32, -1 without classes. size_N2: (height, width). bytes_N: file lengths.
        class_names: in order of class index.
        rejected: (key, reason, detail) of files left out when the folder was scanned.
    """

    keys: np.ndarray
    class_N: np.ndarray
    size_N2: np.ndarray
    bytes_N: np.ndarray
    class_names: tuple[str, ...]
    rejected: tuple[tuple[str, str, str], ...]

    def __len__(self) -> int:
        return len(self.keys)


class Store:
    """An opened store. Opening is cheap; arrays are read on demand.

    Attributes:
        facts: of the root group: images (N), unit (U), group (g), fingerprint, order_seed.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.arrays = Arrays()
        try:
            root = location.read("zarr.json")
        except FileNotFoundError:
            if location.length(commits.marker_key(IMAGES, 0)) is not None:
                raise self.damaged("zarr.json", "is missing") from None
            raise StoreError(
                f"{location.url} is not a store: no zarr.json there. `fkdpipe generate` makes one.",
                code="no-store",
            ) from None
        try:
            attributes = json.loads(root)["attributes"]
        except (ValueError, KeyError, TypeError):
            raise self.damaged("zarr.json", "cannot be read") from None
        self.facts = schema.check_version(attributes, location.url)

    @property
    def url(self) -> str:
        return self.location.url

    @property
    def num_images(self) -> int:
        return int(self.facts["images"])

    @property
    def unit_size(self) -> int:
        """U, images per unit."""
        return int(self.facts["unit"])

    @property
    def group_size(self) -> int:
        """g, crops per crop group."""
        return int(self.facts["group"])

    @property
    def num_units(self) -> int:
        return -(-self.num_images // self.unit_size)

    def unit_rows(self, unit: int) -> slice:
        return slice(unit * self.unit_size, min((unit + 1) * self.unit_size, self.num_images))

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Every part that has been started, by path."""
        return {path: self._load_part(path) for path in sorted(self._part_paths())}

    def refresh(self) -> None:
        """Reload the parts: this or another process may have added some."""
        self.__dict__.pop("parts", None)

    def part(self, path: str) -> Part:
        """Raises StoreError if the part does not exist."""
        if path not in self.parts:
            raise StoreError(
                f"{self.url} has no {path}; it has {', '.join(sorted(self.parts)) or 'nothing'}.",
                code="no-part",
            )
        return self.parts[path]

    def rounds(self) -> list[Part[CropsSettings]]:
        """The crops parts in order of round."""
        return sorted((p for p in self.parts.values() if p.kind == "crops"), key=lambda p: p.round)

    def sources(self, kind: str = "labels", layer: str = "") -> list[str]:
        """Names of the sources that have labels (or features of a layer) in some round."""
        return sorted(
            {p.source for p in self.parts.values() if p.kind == kind and p.layer == layer}
        )

    @cached_property
    def images(self) -> Images:
        """The list of images, checked against its marker."""
        part = self.part(IMAGES)
        marker = self.marker(part, 0)
        if marker is None:
            raise UnsealedStoreError(
                f"{self.url}: its list of images is not finished; run `fkdpipe generate` again.",
                code="unsealed",
            )
        values = {}
        for field in part.fields:
            rows = part.settings.rows[field.name]
            key = schema.shard_key(IMAGES, field, 0, 0)
            shards = {key: self.read_checked(key, marker.files, 0)} if rows else {}
            region = (slice(0, rows),)
            values[field.name] = self.arrays.decode(f"{IMAGES}/{field.name}", region, shards)
        names = ("rejected_key", "rejected_reason", "rejected_detail")
        return Images(
            keys=values["key"].astype(object),
            class_N=values["class"],
            size_N2=values["size"],
            bytes_N=values["bytes"],
            class_names=tuple(str(name) for name in values["class_name"]),
            rejected=tuple(
                (str(a), str(b), str(c))
                for a, b, c in zip(*(values[n] for n in names), strict=True)
            ),
        )

    def marker(self, part: Part, unit: int) -> Marker | None:
        """A unit's marker; None if it is missing, broken or of another part."""
        try:
            marker = commits.marker_from(self.location.read(commits.marker_key(part.path, unit)))
        except (FileNotFoundError, BrokenRecordError):
            return None
        same = (marker.part, marker.unit) == (part.path, unit)
        return marker if same and marker.settings == part.settings_digest else None

    def markers(self, part: Part) -> Iterator[tuple[int, Marker | None]]:
        for unit in range(self.units_of(part)):
            yield unit, self.marker(part, unit)

    def units_of(self, part: Part) -> int:
        return 1 if part.kind == "images" else self.num_units

    def manifest(self, part: Part) -> Manifest | None:
        """The part's manifest, None while it is not sealed.

        Raises:
            DamagedStoreError: the manifest is broken or belongs to another part.
        """
        key = commits.manifest_key(part.path)
        try:
            manifest = commits.manifest_from(self.location.read(key))
        except FileNotFoundError:
            return None
        except BrokenRecordError as error:
            raise self.damaged(key, str(error)) from None
        if manifest.part != part.path or manifest.settings != part.settings_digest:
            raise self.damaged(key, "belongs to another part or other settings")
        return manifest

    def sealed(self, part: Part) -> Manifest:
        """The part's manifest.

        Raises:
            UnsealedStoreError: some units are missing; says how many.
        """
        manifest = self.manifest(part)
        if manifest is None:
            done = sum(marker is not None for _, marker in self.markers(part))
            units = words.count(self.units_of(part), "unit")
            state = f"{done} of {units}"
            if done == self.units_of(part):
                state = f"{units} committed, but the manifest is missing"
            raise UnsealedStoreError(
                f"{self.url}: {part.path} is not finished ({state}). "
                "Run the same `fkdpipe generate` again: it makes the rest.",
                code="unsealed",
            )
        return manifest

    def read(
        self,
        part: Part,
        name: str,
        unit: int,
        crops: Sequence[int] | np.ndarray | None = None,
        *,
        files: commits.FileTable | None = None,
    ) -> np.ndarray:
        """A field of a unit: (images of the unit, crops, ...) in the dtype it is stored in.

        Rows of images that failed hold fill values. Several threads may read at once.

        Args:
            part: of crops, labels or features.
            crops: indices into the part's M crops, in any order; None reads all. Of a wide field,
                only the crop groups that hold them are read.
            files: of the part's manifest, if it is loaded; by default the unit's marker is read.

        Raises:
            UnsealedStoreError: the unit is not committed.
            DamagedStoreError: its bytes differ from what was committed.
        """
        if files is None:
            marker = self.marker(part, unit)
            if marker is None:
                raise UnsealedStoreError(
                    f"{self.url}: unit {unit} of {part.path} is not finished.", code="unsealed"
                )
            files = marker.files
        field, count = part.field(name), part.settings.crops
        span = min(self.group_size, count) if field.wide else count
        crops_m = np.arange(count) if crops is None else np.asarray(crops)
        groups = np.unique(crops_m // span)
        blocks = []
        for group in groups.tolist():
            key = schema.shard_key(part.path, field, unit, group)
            shards = {key: self.read_checked(key, files, unit)}
            region = (self.unit_rows(unit), slice(group * span, min((group + 1) * span, count)))
            blocks.append(self.arrays.decode(f"{part.path}/{name}", region, shards))
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
        if crops is None:
            return joined
        return joined[:, np.searchsorted(groups, crops_m // span) * span + crops_m % span]

    def read_checked(self, key: str, files: commits.FileTable, unit: int | None = None) -> bytes:
        """Read an object and compare its length and checksum with the file table.

        Raises:
            DamagedStoreError: they differ; names the unit and the command that repairs it.
        """
        if key not in files:
            raise self.damaged(key, "is not in any commit record", unit)
        try:
            data = self.location.read(key)
        except FileNotFoundError:
            raise self.damaged(key, "is missing", unit) from None
        if commits.entry(data) != files[key]:
            raise self.damaged(key, "differs from what was committed", unit)
        return data

    def _part_paths(self) -> Iterator[str]:
        for key, _ in self.location.list("commits"):
            if key.endswith("/part.json"):
                yield key.removeprefix("commits/").removesuffix("/part.json")

    def _load_part(self, path: str) -> Part:
        key = commits.part_key(path)
        try:
            body = commits.open_record(self.location.read(key))
            metadata = {name: str(text).encode() for name, text in body["metadata"].items()}
        except (BrokenRecordError, KeyError, AttributeError, FileNotFoundError) as error:
            raise self.damaged(key, str(error)) from None
        for name, text in metadata.items():
            self.read_checked(name, {name: commits.entry(text)})
            self.arrays.load_metadata(name, text)
        try:
            group = json.loads(metadata[f"{path}/zarr.json"])
            facts = group["attributes"][schema.ATTRIBUTE]
            return Part(
                path=path,
                kind=facts["kind"],
                round=facts["round"],
                source=facts["source"],
                layer=facts["tap"],
                settings=settings.parse(facts["kind"], facts["settings"]),
                provenance=facts["provenance"],
                fields=tuple(Field.from_json(field) for field in facts["fields"]),
                metadata=metadata,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged(key, f"is invalid ({error!r})") from None

    def damaged(self, key: str, what: str, unit: int | None = None) -> DamagedStoreError:
        """The error for an object that differs from what was committed."""
        where = "" if unit is None else f" (unit {unit})"
        return DamagedStoreError(
            f"{self.url}: {key}{where} {what}. Run `fkdpipe verify {self.url} --full` for details; "
            "`fkdpipe generate ... --repair` makes broken units again.",
            unit=unit,
        )


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open a store; see `Store`.

    Raises:
        StoreError: there is no store, or its format version cannot be read.
    """
    return Store(open_location(url))
