"""A round: M crops of every image, drawn from one distribution with one seed.

Rounds continue one endless sequence of crops, so crop 7 of an image is the same crop whether the
store was made in one round or grew over several.
"""

from __future__ import annotations

import numpy as np

from fkdpipe.pixels import crops
from fkdpipe.pixels.crops import Crops
from fkdpipe.storage import commits, schema
from fkdpipe.storage.schema import Field, Json
from fkdpipe.storage.settings import CropsSettings
from fkdpipe.storage.store import Part, Store


def crops_of(store: Store, part: Part[CropsSettings], unit: int) -> Crops:
    """The crops of a unit: as committed, or drawn from the seed of the round.

    Rows of images that failed hold fill values.

    Raises:
        DamagedStoreError: committed boxes differ from their checksum.
        StoreError: not committed, and this version cannot draw them (imported boxes).
    """
    marker = store.marker(part, unit)
    if marker is None:
        return draw(store, part, unit)
    if part.settings.derived:
        return derive(store, part, unit, marker.facts)
    names = [field.name for field in fields_of(part.settings)]
    return of_values({n: store.read(part, n, unit, files=marker.files) for n in names})


def fields_of(settings: CropsSettings) -> list[Field]:
    """The arrays of a round, whether they are stored or derived."""
    return schema.crop_fields(jitter=settings.jitter is not None)


def of_values(values: dict[str, np.ndarray]) -> Crops:
    """Crops from the arrays of a round."""
    return Crops(values["box"], values["flip"], values.get("jitter"))


def values_of(recorded: Crops) -> dict[str, np.ndarray]:
    """Crops as the arrays of a round."""
    values = {"box": recorded.box_NM4, "flip": recorded.flip_NM}
    return values if recorded.jitter_NM4 is None else {**values, "jitter": recorded.jitter_NM4}


def draw(store: Store, part: Part[CropsSettings], unit: int) -> Crops:
    """Draw the crops of a unit from the seed of its round.

    Raises:
        StoreError: this version cannot draw from the distribution.
    """
    rows, settings = store.unit_rows(unit), part.settings
    distribution = settings.distribution
    assert settings.seed is not None  # every known distribution has one
    return crops.sample(
        distribution,
        seed=settings.seed,
        image_id_N=crops.image_ids(list(store.images.keys[rows])),
        size_N2=store.images.size_N2[rows],
        crops_M=np.arange(settings.first, settings.first + settings.crops),
    )


def derive(store: Store, part: Part[CropsSettings], unit: int, facts: Json) -> Crops:
    """Draw the crops of a committed unit that stores only their checksum.

    Args:
        facts: of the unit's marker.

    Raises:
        DamagedStoreError: the crops do not match the checksum.
    """
    result = draw(store, part, unit)
    if checksum(result) != facts.get("crops_crc32c"):
        raise store.damaged(part.path, "has boxes that cannot be derived again", unit)
    return result


def checksum(recorded: Crops) -> str:
    """crc32c (hex) of boxes, flips and jitter of a unit; a derived round stores nothing else."""
    data = recorded.box_NM4.astype("<u2").tobytes() + recorded.flip_NM.tobytes()
    if recorded.jitter_NM4 is not None:
        data += recorded.jitter_NM4.astype("<f4").tobytes()
    return commits.crc(data)
