"""Arrays of a store: names, shapes, dtypes, chunks, shards, codecs. `docs/format.md` in code.

A store is a Zarr v3 hierarchy, one array per field, with codecs of the Zarr specification only and
crc32c last in every chain. A *part* is written, committed and sealed as a whole:

    images                              the list of images
    rounds/<r>/crops                    boxes and flips of one round
    rounds/<r>/labels/<source>          one teacher's labels of those crops
    rounds/<r>/features/<source>/<layer>  its features, layer = pre, post or map

Letters: N images, M crops of a round, U images per unit, g crops per crop group, C classes,
K kept classes, D feature dimensions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fkdpipe.common.errors import StoreError, UsageError
from fkdpipe.storage.labels import Form, id_dtype

FORMAT = "fkdpipe"
FORMAT_VERSION = 1
ATTRIBUTE = "fkdpipe"  # the attribute of every group that holds our metadata

UNIT_IMAGES = 1024
UNIT_BUFFER_BYTES = 2**30
LEAST_UNIT_IMAGES = 32
CHUNK_IMAGES = 128  # inner chunk; arrays are read a shard at a time
FEW_CLASSES = 16  # up to this many, zstd's slow levels are worth it for ids
GROUP_CROPS = 4  # crop group of wide arrays

Json = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """One array of a part.

    Attributes:
        shape: per row: () or (2,) in `images`, per crop elsewhere.
        per_crop: axis 1 of the array is the crop; else there is one row per image.
        wide: sharded by crop group and streamed; else sharded by unit and read whole.
        codec: "bitshuffle", "planar", "zstd" or "raw"; see `_codecs`.
        fill: fill value, found in the rows of failed images.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    fill: float | int | str
    per_crop: bool = True
    wide: bool = False

    def to_json(self) -> Json:
        facts = dataclasses.asdict(self)
        facts["shape"] = list(self.shape)
        facts["fill"] = "NaN" if self.fill != self.fill else self.fill
        return facts

    @classmethod
    def from_json(cls, facts: Json) -> Self:
        fill = math.nan if facts["fill"] == "NaN" else facts["fill"]
        return cls(**{**facts, "shape": tuple(facts["shape"]), "fill": fill})


def image_fields() -> list[Field]:
    """Arrays of `images`; the first four by row in the store's order."""
    return [
        Field("key", "str", (), "zstd", "", per_crop=False),
        Field("class", "int32", (), "bitshuffle", -1, per_crop=False),
        Field("size", "uint16", (2,), "bitshuffle", 0, per_crop=False),
        Field("bytes", "int64", (), "bitshuffle", 0, per_crop=False),
        Field("class_name", "str", (), "zstd", "", per_crop=False),
        Field("rejected_key", "str", (), "zstd", "", per_crop=False),
        Field("rejected_reason", "str", (), "zstd", "", per_crop=False),
        Field("rejected_detail", "str", (), "zstd", "", per_crop=False),
    ]


def crop_fields(*, jitter: bool = False) -> list[Field]:
    """Arrays of `rounds/<r>/crops`."""
    fields = [
        Field("box", "uint16", (4,), "planar", 65_535),
        Field("flip", "bool", (), "bitshuffle", False),
    ]
    if jitter:
        fields.append(Field("jitter", "float32", (4,), "bitshuffle", math.nan))
    return fields


def label_fields(form: Form, classes: int) -> list[Field]:
    """Arrays of `rounds/<r>/labels/<source>`; classes is the width of what is stored."""
    if not form.sparse:
        scores = Field(form.value_field, "float16", (classes,), "raw", math.nan, wide=True)
        largest = Field("logit_max", "float32", (), "bitshuffle", math.nan)
        return [scores, largest] if form.kind == "logits" else [scores]
    dtype = id_dtype(classes)
    ids = Field("ids", dtype.name, (form.k,), "zstd", int(np.iinfo(dtype).max))
    if form.kind == "hard":
        return [ids]
    if form.compact:
        return [ids, Field(form.value_field, "uint8", (form.k,), "planar-bytes", 0)]
    return [ids, Field(form.value_field, "float16", (form.k,), "planar", 0)]


def array_settings(field: Field, *, rows: int, crops: int, unit: int, group: int) -> Json:
    """Keyword arguments of `zarr.create_array` for a field.

    Args:
        rows: N (or, in `images`, the length of the list). crops: M. unit: U. group: g.
    """
    tail = field.shape
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    names: tuple[str, ...]
    if not field.per_crop:
        shape, chunks, shards = (rows, *tail), (max(rows, 1), *tail), None
        names = ("row", *_tail_names(tail))
    else:
        shape = (rows, crops, *tail)
        span = group if field.wide else crops
        chunks = (min(CHUNK_IMAGES, unit), span, *tail)
        shards = (unit, span, *tail)
        names = ("image", "crop", *_tail_names(tail))
    filters, compressors = _codecs(field, chunks)
    return {
        "shape": shape,
        "dtype": field.dtype,
        "chunks": chunks,
        "shards": shards,
        "filters": filters,
        "compressors": compressors,
        "fill_value": field.fill,
        "dimension_names": names,
        "config": {"write_empty_chunks": True},
    }


def _tail_names(tail: tuple[int, ...]) -> list[str]:
    return ["value"] if len(tail) == 1 else [f"value{k}" for k in range(len(tail))]


def _codecs(field: Field, chunks: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    """(array-to-array, bytes-to-bytes) codecs, chosen by measurement: benchmarks/footprint.py."""
    from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec, ZstdCodec

    size = 1 if field.dtype in ("bool", "str") else np.dtype(field.dtype).itemsize
    if field.codec.startswith("planar"):
        # One plane per coordinate or kept class, each compressed as a block of its own.
        order = (len(chunks) - 1, *range(len(chunks) - 1))
        shuffle: Any = "noshuffle" if field.codec == "planar-bytes" else "bitshuffle"
        plane = BloscCodec(
            typesize=size,
            cname="zstd",
            clevel=9,
            shuffle=shuffle,
            blocksize=math.prod(chunks[:-1]) * size,
        )
        return [TransposeCodec(order=order)], [plane, Crc32cCodec()]
    bitshuffle = BloscCodec(typesize=size, cname="zstd", clevel=9, shuffle="bitshuffle")
    level = 19 if math.prod(field.shape) <= FEW_CLASSES else 9
    chains: dict[str, list[Any]] = {"bitshuffle": [bitshuffle], "zstd": [ZstdCodec(level=level)]}
    return [], [*chains.get(field.codec, []), Crc32cCodec()]


def shard_key(part: str, field: Field, unit: int, group: int) -> str:
    """Key of the object that holds a field of a unit (for a wide field, of one crop group)."""
    if not field.per_crop:
        return "/".join([part, field.name, "c", *["0"] * (1 + len(field.shape))])
    return "/".join([part, field.name, "c", str(unit), str(group), *["0"] * len(field.shape)])


def unit_images(bytes_per_image: int) -> int:
    """Images per unit: 1,024, halved until a unit's buffers fit in `UNIT_BUFFER_BYTES`."""
    images = UNIT_IMAGES
    while images > LEAST_UNIT_IMAGES and images * bytes_per_image > UNIT_BUFFER_BYTES:
        images //= 2
    return images


def bytes_per_image(fields: list[Field], crops: int) -> int:
    """Uncompressed bytes of one image's rows."""
    total = 0
    for field in fields:
        item = 16 if field.dtype == "str" else np.dtype(field.dtype).itemsize
        total += item * math.prod(field.shape) * (crops if field.per_crop else 1)
    return total


def check_source_name(name: str) -> str:
    """Returns a valid source name, which is also a folder name; raises UsageError for others."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name):
        raise UsageError(
            f"{name!r} cannot name a source: use letters, digits, '.', '_', '+' and '-'."
        )
    return name


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two settings differ, one line each: `teacher.0.weights: a, now b`."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        name = f"{prefix}{key}"
        if isinstance(a, list) and isinstance(b, list):
            a, b = ({str(k): v for k, v in enumerate(items)} for items in (a, b))
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{name}: {_short(a)}, now {_short(b)}")
    return lines


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "..." + text[-12:]


def check_version(attributes: Mapping[str, Any], where: str) -> Json:
    """The facts of a store's root group.

    Raises:
        StoreError: not an fkdpipe store, or of a format version that cannot be read.
    """
    facts = attributes.get(ATTRIBUTE)
    if not isinstance(facts, Mapping) or facts.get("format") != FORMAT:
        raise StoreError(f"{where} is a Zarr group, but not an fkdpipe store.", code="no-store")
    if facts.get("version") != FORMAT_VERSION:
        raise StoreError(
            f"{where} has format version {facts.get('version')}; this fkdpipe reads "
            f"{FORMAT_VERSION}. Install the version that wrote it.",
            code="version",
        )
    return dict(facts)
