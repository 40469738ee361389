"""How few bytes the stored values could take: an ideal code's length under a stated model.

    field                             model
    box                               its distribution: sizes even over those allowed, positions
                                      over what is left; exact but for rounding at the region's edge
    flip                              its distribution: the entropy of its probability
    ids                               adaptive: a class by how often the image's earlier crops had
                                      it, else by its share among all; see `ids_bits`
    prob, stick                       order 0: the entropy of the stored numbers, at each place
    log_prob, logit, value, code      order 0: the entropy of the stored numbers, all together

An order-0 code knows nothing but how often each number occurs. The entropy of a sample falls short
of that of its source by about (distinct - 1) / (2 n) nats; Miller and Madow's correction (1955)
adds that. Where fewer than `ENOUGH` values were seen per distinct one even that is too rough, and
nothing is said (float32 fields always).

Letters: N images, M crops of each, K kept classes.
"""

from __future__ import annotations

import math

import numpy as np

from fkdpipe.pixels import crops
from fkdpipe.storage import rounds, schema
from fkdpipe.storage.schema import Field
from fkdpipe.storage.settings import CropsSettings
from fkdpipe.storage.store import Part, Store

SAMPLE_CROPS = 200_000  # values are read until so many crops were seen
LAW_IMAGES = 512
ENOUGH = 5
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 1024.0)  # tried for `ids_bits`


def bytes_per_crop(store: Store, part: Part) -> dict[str, float | None]:
    """The bound of each field of a part, None where it cannot be told.

    Only committed units are read, and no more than a sample needs: a store's images are in random
    order, so its first units are a fair sample.

    Raises:
        DamagedStoreError: a shard differs from what was committed.
    """
    if part.kind == "crops":
        bits = _crop_bits(store, part)
    else:
        bits = {field.name: _field_bits(store, part, field) for field in part.fields}
    return {name: None if value is None else value / 8 for name, value in bits.items()}


def _crop_bits(store: Store, part: Part[CropsSettings]) -> dict[str, float | None]:
    if not part.settings.known or part.settings.derived:
        return {field.name: None for field in part.fields}
    distribution = part.settings.distribution
    unit = next((unit for unit, marker in store.markers(part) if marker is not None), None)
    if unit is None:
        return {field.name: None for field in part.fields}
    rows = np.arange(store.num_images)[store.unit_rows(unit)][:LAW_IMAGES]
    drawn = rounds.crops_of(store, part, unit).box_NM4[: len(rows)]
    sizes = store.images.size_N2[rows].astype(np.int64)
    known = (drawn[..., 2] < schema.crop_fields()[0].fill).all(axis=1)  # others failed
    bits = [
        box_bits(distribution, size, box)
        for size, box in zip(sizes[known], drawn[known], strict=True)
    ]
    known_bits = {
        "box": float(np.mean(bits)) if bits else None,
        "flip": _binary_entropy(distribution.flip),
    }
    return {field.name: known_bits.get(field.name) for field in part.fields}


def box_bits(distribution: crops.CropDistribution, size_2: np.ndarray, box_M4: np.ndarray) -> float:
    """Bits of a box of one image, mean over its crops.

    The law draws the area evenly and the logarithm of the ratio evenly; the Jacobian of
    (height x width, ln width / height) is the constant 2, so sizes are even over those allowed.
    """
    height, width = (int(side) for side in size_2)
    h = np.arange(1, height + 1)
    low = np.maximum(distribution.scale[0] * height * width / h, distribution.ratio[0] * h)
    high = np.minimum(
        np.minimum(distribution.scale[1] * height * width / h, distribution.ratio[1] * h), width
    )
    sizes = max(float(np.maximum(high - low, 0).sum()), 1.0)
    box = box_M4.astype(np.float64)
    places = (height - box[:, 2] + 1) * (width - box[:, 3] + 1)
    return math.log2(sizes) + float(np.log2(places).mean())


def _binary_entropy(p: float) -> float:
    return sum(-q * math.log2(q) for q in (p, 1 - p) if 0 < q < 1)


def _field_bits(store: Store, part: Part, field: Field) -> float | None:
    values = _sample(store, part, field)
    if values is None:
        return None
    if field.name == "ids":
        return ids_bits(values)
    if field.dtype == "float32":
        return None
    items = values.view(f"u{values.dtype.itemsize}")
    if field.wide:
        bits = entropy_bits(items.reshape(-1))
        return None if bits is None else bits * math.prod(field.shape)
    flat_BK = items.reshape(-1, math.prod(field.shape))
    columns = [entropy_bits(column) for column in flat_BK.T]
    return None if None in columns else float(sum(bits for bits in columns if bits is not None))


def _sample(store: Store, part: Part, field: Field) -> np.ndarray | None:
    """(N, M, ...) values of the first committed units; of wide fields, of their first group."""
    crops_M = part.settings.crops
    span = min(store.group_size, crops_M) if field.wide else crops_M
    parts: list[np.ndarray] = []
    seen = 0
    for unit, marker in store.markers(part):
        if marker is None:
            continue
        values = store.read(part, field.name, unit, range(span), files=marker.files)
        first = store.unit_rows(unit).start
        good = np.delete(values, [row - first for row in marker.failed], axis=0)
        parts.append(good)
        seen += good.shape[0] * good.shape[1]
        if seen >= SAMPLE_CROPS:
            break
    return np.concatenate(parts) if seen else None


def entropy_bits(values_B: np.ndarray) -> float | None:
    """Order-0 entropy of a value with Miller and Madow's correction, None for too few values."""
    counts = np.unique(values_B, return_counts=True)[1].astype(np.float64)
    total = counts.sum()
    if len(counts) > 1 and total < ENOUGH * len(counts):
        return None
    share = counts / total
    correction = (len(counts) - 1) / (2 * total * math.log(2))
    return float(-(share * np.log2(share)).sum() + correction)


def ids_bits(ids_NMK: np.ndarray) -> float:
    """Bits of a crop's kept classes under an adaptive code (Blackwell and MacQueen's urn, 1973).

    Crop j's first choice c costs -log2 (n + a q) / (j + a): n of the image's j earlier crops had it
    as theirs, q is its share among all first choices. The K - 1 others are coded alike, from the
    kept classes of the earlier crops, less log2 (K - 1)! because their order carries nothing. The
    weight a is the best of `WEIGHTS`. Any decoder could follow, so this is a length that can be
    reached; a cleverer model may need less.
    """
    first = _urn_bits(ids_NMK[:, :, :1], ids_NMK[:, :, :1])
    if ids_NMK.shape[2] == 1:
        return first
    others = _urn_bits(ids_NMK[:, :, 1:], ids_NMK)
    return first + others - math.lgamma(ids_NMK.shape[2]) / math.log(2)


def _urn_bits(coded_NMK: np.ndarray, known_NML: np.ndarray) -> float:
    """Bits of a crop's coded classes, given the known ones of its image's earlier crops.

    A class costs -log2 (n + a q) / (j L + a): n of the image's j earlier crops know it, each of
    them knows L classes, and q is its share among all that are coded. The coded classes of a crop
    are the last K of its known ones.
    """
    crops_M, kept = coded_NMK.shape[1:]
    known = known_NML.shape[2]
    n_NMK = _earlier_crops(known_NML)[:, :, known - kept :]
    _, index, counts = np.unique(coded_NMK, return_inverse=True, return_counts=True)
    q_NMK = (counts / coded_NMK.size)[index].reshape(coded_NMK.shape)
    all_known_M1 = known * np.arange(crops_M)[:, None]
    costs = [-np.log2((n_NMK + a * q_NMK) / (all_known_M1 + a)).sum(axis=2).mean() for a in WEIGHTS]
    return float(min(costs))


def _earlier_crops(ids_NML: np.ndarray) -> np.ndarray:
    """int64 (N, M, L): how many earlier crops of its image have each class, which a crop has once.

    A stable sort brings the same class of the same image together, in the order of the crops; how
    far one is from the first of these is how many came before it.
    """
    _, number = np.unique(ids_NML, return_inverse=True)
    image_N11 = np.arange(len(ids_NML))[:, None, None]
    pair = (image_N11 * (number.max() + 1) + number.reshape(ids_NML.shape)).reshape(-1)
    order = np.argsort(pair, kind="stable")
    position = np.arange(len(pair))
    is_first = np.r_[True, np.diff(pair[order]) != 0]
    first = np.maximum.accumulate(np.where(is_first, position, 0))
    earlier = np.empty_like(position)
    earlier[order] = position - first
    return earlier.reshape(ids_NML.shape)
