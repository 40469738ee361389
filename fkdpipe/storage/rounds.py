"""A round: M crops of every image, drawn by one law from one seed.

Rounds follow one another in an endless sequence of crops, so crop 7 of an image is the same crop
whether a store was made in one round or grew by several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fkdpipe.common.errors import StoreError
from fkdpipe.pixels import crops
from fkdpipe.pixels.crops import CropDistribution, Crops, Jitter
from fkdpipe.storage import commits, schema
from fkdpipe.storage.schema import Field, Json
from fkdpipe.storage.store import Part, Store


def crop_settings(
    distribution: CropDistribution, *, seed: int, first: int, count: int, derived: bool
) -> Json:
    """A round of crops: its distribution, and which crops of the endless sequence it holds."""
    settings: Json = {
        "law": crops.DISTRIBUTION_NAME,
        "version": crops.DISTRIBUTION_VERSION,
        "scale": list(distribution.scale),
        "ratio": list(distribution.ratio),
        "flip": distribution.flip,
        "seed": seed,
        "boxes": "derived" if derived else "stored",
        "first": first,
        "crops": count,
    }
    if distribution.jitter is not None:  # a round without it has no such key
        settings["jitter"] = dataclasses.asdict(distribution.jitter)
    return settings


def distribution_of(settings: Mapping[str, Any]) -> CropDistribution:
    """The law recorded in a round's settings.

    Raises:
        StoreError: a distribution, or a version of it, that this fkdpipe does not know.
    """
    known = (crops.DISTRIBUTION_NAME, crops.DISTRIBUTION_VERSION)
    if (settings["law"], settings["version"]) != known:
        raise StoreError(
            f"these crops follow the law {settings['law']} (version {settings['version']}), which "
            "this fkdpipe cannot draw.",
            code="unknown-law",
        )
    return CropDistribution(
        scale=tuple(settings["scale"]),
        ratio=tuple(settings["ratio"]),
        flip=settings["flip"],
        jitter=Jitter(**settings["jitter"]) if "jitter" in settings else None,
    )


def crops_of(store: Store, part: Part, unit: int) -> Crops:
    """The crops of a unit: as committed, or drawn from the seed of the round.

    Rows of images that failed hold fill values.

    Raises:
        DamagedStoreError: committed boxes differ from their checksum.
        StoreError: not committed, and of a law that cannot be drawn here (imported boxes).
    """
    marker = store.marker(part, unit)
    if marker is None or not part.fields:
        drawn = draw(store, part, unit)
        if marker is not None and checksum(drawn) != marker.made["crops_crc32c"]:
            raise store.damaged(part.path, "its boxes cannot be derived again", unit)
        return drawn
    values = {}
    for field in part.fields:
        key = schema.shard_key(part.path, field, unit, 0)
        shards = {key: store.read_checked(key, marker.files, unit)}
        region = (store.unit_rows(unit),)
        values[field.name] = store.arrays.decode(f"{part.path}/{field.name}", region, shards)
    return Crops(values["box"], values["flip"], values.get("jitter"))


def fields_of(settings: Mapping[str, Any]) -> list[Field]:
    """The arrays of a round, whether they are stored or derived."""
    return schema.crop_fields(jitter="jitter" in settings)


def values_of(drawn: Crops) -> dict[str, np.ndarray]:
    """Crops as the arrays of a round."""
    values = {"box": drawn.box_NM4, "flip": drawn.flip_NM}
    return values if drawn.jitter_NM4 is None else {**values, "jitter": drawn.jitter_NM4}


def draw(store: Store, part: Part, unit: int) -> Crops:
    """The crops of a unit, drawn anew from the seed of its round."""
    rows = store.unit_rows(unit)
    first, count = int(part.settings["first"]), int(part.settings["crops"])
    return crops.sample(
        distribution_of(part.settings),
        seed=int(part.settings["seed"]),
        image_id_N=crops.image_ids(list(store.images.keys[rows])),
        size_N2=store.images.size_N2[rows],
        crops_M=np.arange(first, first + count),
    )


def checksum(drawn: Crops) -> str:
    """crc32c (hex) over boxes, flips and jitter of a unit: what a derived round stores of them."""
    recorded = drawn.box_NM4.astype("<u2").tobytes() + drawn.flip_NM.tobytes()
    if drawn.jitter_NM4 is not None:
        recorded += drawn.jitter_NM4.astype("<f4").tobytes()
    return commits.crc(recorded)
