"""Lower bounds on the stored size: code lengths of an ideal code under a given model.

    field                             model
    box                               crop distribution: uniform over the allowed sizes, then over
                                      the positions; exact up to rounding at the region's edge
    flip                              crop distribution: the entropy of its probability
    ids                               adaptive: class counts in the image's earlier crops, and
                                      class frequencies over all; see `ids_bits`
    prob, stick                       order 0: the entropy of the stored values, at each position
    log_prob, logit, value, code      order 0: the entropy of the stored values, pooled

An order-0 code uses only the frequency of each value. The entropy of a sample underestimates that
of its source by about (distinct - 1) / (2 n) nats, which the Miller-Madow correction (1955) adds.
With fewer than `ENOUGH` samples per distinct value this is still too rough, and the bound is None
(always for float32 fields).

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

SAMPLE_CROPS = 200_000  # read at least this many crops, if there are
BOX_IMAGES = 512
ENOUGH = 5
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 1024.0)  # tried for `ids_bits`


def bytes_per_crop(store: Store, part: Part) -> dict[str, float | None]:
    """The bound of each field of a part; None if unknown.

    Only the first committed units are read: a store's images are in random order, so these are an
    unbiased sample.

    Raises:
        DamagedStoreError: a shard fails its checksum.
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
    rows = np.arange(store.num_images)[store.unit_rows(unit)][:BOX_IMAGES]
    boxes_NM4 = rounds.crops_of(store, part, unit).box_NM4[: len(rows)]
    sizes = store.images.size_N2[rows].astype(np.int64)
    known = (boxes_NM4[..., 2] < schema.crop_fields()[0].fill).all(
        axis=1
    )  # failed images have fill values
    bits = [
        box_bits(distribution, size, box)
        for size, box in zip(sizes[known], boxes_NM4[known], strict=True)
    ]
    known_bits = {
        "box": float(np.mean(bits)) if bits else None,
        "flip": _binary_entropy(distribution.flip),
    }
    return {field.name: known_bits.get(field.name) for field in part.fields}


def box_bits(distribution: crops.CropDistribution, size_2: np.ndarray, box_M4: np.ndarray) -> float:
    """Bits per box of one image, mean over its crops.

    The crop distribution is uniform in the area and in the logarithm of the aspect ratio; the
    Jacobian of (height x width, ln width / height) is the constant 2, so sizes are uniform over
    those allowed.
    """
    height, width = (int(side) for side in size_2)
    h = np.arange(1, height + 1)
    low = np.maximum(distribution.scale[0] * height * width / h, distribution.ratio[0] * h)
    high = np.minimum(
        np.minimum(distribution.scale[1] * height * width / h, distribution.ratio[1] * h), width
    )
    sizes = max(float(np.maximum(high - low, 0).sum()), 1.0)
    box = box_M4.astype(np.float64)
    positions = (height - box[:, 2] + 1) * (width - box[:, 3] + 1)
    return math.log2(sizes) + float(np.log2(positions).mean())


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
    """(N, M, ...) values of the first committed units; for wide fields, of the first crop group."""
    crops_M = part.settings.crops
    span = min(store.group_size, crops_M) if field.wide else crops_M
    parts: list[np.ndarray] = []
    count = 0
    for unit, marker in store.markers(part):
        if marker is None:
            continue
        values = store.read(part, field.name, unit, range(span), files=marker.files)
        first = store.unit_rows(unit).start
        good = np.delete(values, [row - first for row in marker.failed], axis=0)
        parts.append(good)
        count += good.shape[0] * good.shape[1]
        if count >= SAMPLE_CROPS:
            break
    return np.concatenate(parts) if count else None


def entropy_bits(values_B: np.ndarray) -> float | None:
    """Order-0 entropy per value with the Miller-Madow correction; None for too few values."""
    counts = np.unique(values_B, return_counts=True)[1].astype(np.float64)
    total = counts.sum()
    if len(counts) > 1 and total < ENOUGH * len(counts):
        return None
    share = counts / total
    correction = (len(counts) - 1) / (2 * total * math.log(2))
    return float(-(share * np.log2(share)).sum() + correction)


def ids_bits(ids_NMK: np.ndarray) -> float:
    """Bits per crop for its kept classes under an adaptive code (Blackwell-MacQueen urn, 1973).

    The top class c of crop j costs -log2 (n + a q) / (j + a), where n of the image's j earlier
    crops have the same top class and q is its frequency among all top classes. The K - 1 others
    are coded likewise, from the kept classes of the earlier crops, minus log2 (K - 1)! because
    their order carries no information. The weight a is the best of `WEIGHTS`. The code is
    decodable, so this length is achievable; a better model may need fewer bits.
    """
    first = _urn_bits(ids_NMK[:, :, :1], ids_NMK[:, :, :1])
    if ids_NMK.shape[2] == 1:
        return first
    others = _urn_bits(ids_NMK[:, :, 1:], ids_NMK)
    return first + others - math.lgamma(ids_NMK.shape[2]) / math.log(2)


def _urn_bits(coded_NMK: np.ndarray, known_NML: np.ndarray) -> float:
    """Bits per crop for its coded classes, given the known classes of the image's earlier crops.

    A class costs -log2 (n + a q) / (j L + a): n of the image's j earlier crops have it among their
    L known classes, and q is its frequency among all coded classes. The coded classes of a crop
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
    """int64 (N, M, L): number of earlier crops of the image that have each class.

    The classes of a crop are distinct. A stable sort groups equal classes of an image in the order
    of the crops; the count is the distance from the start of the group.
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
