"""Simulated labels of a 1,000-class teacher, with the statistics of a real one.

Class directions are grouped in superclasses. An image is its class direction plus noise, and a crop
is its image plus further noise. The scores are the products of the crop with all class directions,
sharpened by a factor per crop. Part of the probability follows a flattened version of the scores,
as for a teacher trained with label smoothing:

    z = beta v W^T,  p = (1 - eps) softmax(z exp(q n)) + eps softmax(r z),  n ~ N(0, 1)

The parameters were fitted to the statistics in `WANTED` before any store was generated, and must
not be tuned for store size. Boxes are drawn from the recorded distribution on image sizes similar
to ImageNet's.

Symbols: N images, M crops each, C classes, K kept classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fkdpipe.pixels import crops
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import labels, rounds, schema, writer
from fkdpipe.storage.labels import Form
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.settings import LabelSettings
from fkdpipe.storage.store import Part, Store

CLASSES = 1000
KEPT = 10
SUPERCLASSES, SPREAD, DIMS = 348, 0.3557, 64
IMAGE_NOISE, CROP_NOISE = 1.7216, 0.8106
BETA, CONFIDENCE, SMOOTHED, FLATTENED = 29.045, 0.5698, 0.11106, 0.17853
SEED = 2021

# name: (target value, tolerance)
WANTED = {
    "median_top1": (0.715, 0.01),
    "p10_top1": (0.34, 0.015),
    "p90_top1": (0.90, 0.01),
    "top5_mass": (0.85, 0.02),
    "entropy_nats": (1.56, 0.1),
    "distinct_top1": (6.9, 0.7),
    "distinct_top5": (43.0, 4.0),
}

# Height, width and frequency: a mix like ImageNet's, with a mean of 400 x 350 to 500 x 375.
SIZES = ((375, 500, 0.55), (500, 375, 0.2), (333, 500, 0.15), (500, 333, 0.04), (480, 640, 0.06))


@dataclass(frozen=True)
class Labels:
    """Simulated labels of N images x M crops.

    Attributes:
        ids_NMK: int64, the ten most probable classes, most probable first.
        prob_NMK: float32, their probabilities.
        sample_SC: float32, all probabilities of the first S crops.
        size_N2: uint16 (height, width) of each image.
        statistics: as named in `WANTED`.
    """

    ids_NMK: np.ndarray
    prob_NMK: np.ndarray
    sample_SC: np.ndarray
    size_N2: np.ndarray
    statistics: dict[str, float]

    @property
    def images(self) -> int:
        return len(self.ids_NMK)

    @property
    def crops(self) -> int:
        return self.ids_NMK.shape[1]


def simulate(images: int, crops_M: int, *, seed: int = SEED, sample: int = 4096) -> Labels:
    """Draw labels; `check` tests whether they resemble those of a real teacher."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(SUPERCLASSES, DIMS))
    ways = centres[np.arange(CLASSES) % SUPERCLASSES]
    ways = ways + SPREAD * random.normal(size=(CLASSES, DIMS))
    ways = (ways / np.linalg.norm(ways, axis=1, keepdims=True)).astype(np.float32)
    ids = np.empty((images, crops_M, KEPT), dtype=np.int64)
    prob = np.empty((images, crops_M, KEPT), dtype=np.float32)
    sampled: list[np.ndarray] = []
    entropy = 0.0
    step = max(1, 4096 // crops_M)
    for first in range(0, images, step):
        count = min(step, images - first)
        p_BC = _probabilities(ways, count, crops_M, random)
        entropy += float(-(p_BC * np.log(np.maximum(p_BC, 1e-30))).sum(dtype=np.float64))
        if sum(map(len, sampled)) < sample:
            sampled.append(p_BC[:sample])
        some = np.argpartition(-p_BC, KEPT, axis=1)[:, :KEPT]
        kept = np.take_along_axis(p_BC, some, 1)
        order = np.argsort(-kept, axis=1, kind="stable")
        rows = slice(first, first + count)
        ids[rows] = np.take_along_axis(some, order, 1).reshape(count, crops_M, KEPT)
        prob[rows] = np.take_along_axis(kept, order, 1).reshape(count, crops_M, KEPT)
    chosen = random.choice(len(SIZES), size=images, p=[share for *_, share in SIZES])
    sizes = np.array([(h, w) for h, w, _ in SIZES])[chosen] - random.integers(0, 40, (images, 2))
    statistics = _statistics(ids, prob, entropy / (images * crops_M))
    return Labels(
        ids,
        prob,
        np.concatenate([*sampled, np.empty((0, CLASSES), np.float32)]),
        sizes.astype(np.uint16),
        statistics,
    )


def check(made: Labels) -> None:
    """Raises ValueError if a statistic differs from a real teacher's by more than its tolerance."""
    for name, (wanted, tolerance) in WANTED.items():
        found = made.statistics[name]
        if abs(found - wanted) > tolerance:
            raise ValueError(f"{name} is {found:.4g}, not {wanted} within {tolerance}")


def _probabilities(
    ways: np.ndarray, count: int, crops_M: int, random: np.random.Generator
) -> np.ndarray:
    """float32 (count * M, C)."""
    centre = ways[random.integers(0, CLASSES, count)]
    image = centre + random.normal(size=(count, DIMS)) * (IMAGE_NOISE / DIMS**0.5)
    crop = image[:, None] + random.normal(size=(count, crops_M, DIMS)) * (CROP_NOISE / DIMS**0.5)
    z = np.float32(BETA) * (crop.reshape(-1, DIMS).astype(np.float32) @ ways.T)
    z -= z.max(axis=1, keepdims=True)
    factor = np.exp(CONFIDENCE * random.normal(size=(len(z), 1))).astype(np.float32)
    sharp, flat = np.exp(z * factor), np.exp(z * np.float32(FLATTENED))
    sharp *= (1 - SMOOTHED) / sharp.sum(axis=1, keepdims=True)
    flat *= SMOOTHED / flat.sum(axis=1, keepdims=True)
    return sharp + flat


def _statistics(ids: np.ndarray, prob: np.ndarray, entropy: float) -> dict[str, float]:
    top1 = prob[..., 0]
    return {
        "median_top1": float(np.median(top1)),
        "p10_top1": float(np.quantile(top1, 0.1)),
        "p90_top1": float(np.quantile(top1, 0.9)),
        "top5_mass": float(prob[..., :5].sum(-1).mean()),
        "entropy_nats": entropy,
        "distinct_top1": float(np.mean([len(np.unique(rows[:, 0])) for rows in ids])),
        "distinct_top5": float(np.mean([len(np.unique(rows[:, :5])) for rows in ids])),
    }


def make_store(folder: Path, made: Labels, form: Form, *, derived: bool = False) -> Store:
    """Write a store of these labels with the public writer; sparse forms only."""
    store = writer.create_store(LocalLocation(folder), columns(made), seed=0, unit=1024)
    distribution = CropDistribution()
    boxes = writer.add_crops(store, distribution, seed=0, count=made.crops, derived=derived)
    settings = LabelSettings(
        form,
        CLASSES,
        made.crops,
        precision="float32",
        replay="cpu",
        teachers=({"name": "simulated", "seed": SEED},),
    )
    fields = schema.label_fields(form, CLASSES)
    taught = writer.add_part(store, "rounds/0/labels/simulated", settings, fields)
    row_of = {key: row for row, key in enumerate(_keys(made.images))}
    for unit in range(store.num_units):
        rows = np.array([row_of[key] for key in store.images.keys[store.unit_rows(unit)]])
        fill(store, boxes, taught, unit, encode(form, made.ids_NMK[rows], made.prob_NMK[rows]))
    for part in (boxes, taught):
        assert writer.seal(store, part)
    return store


def fill(store: Store, boxes: Part, taught: Part, unit: int, values: dict[str, np.ndarray]) -> None:
    """Commit a unit's crops and labels."""
    drawn = rounds.draw(store, boxes, unit)
    stored = {"box": drawn.box_NM4, "flip": drawn.flip_NM} if boxes.fields else {}
    made = {"crops_crc32c": rounds.checksum(drawn)}
    writer.commit_unit(store, boxes, unit, stored, facts=made)
    batch = {"batch": 64, "device": "cpu", "threads": 1}
    writer.commit_unit(store, taught, unit, values, facts=batch)


def encode(form: Form, ids_NMK: np.ndarray, prob_NMK: np.ndarray) -> dict[str, np.ndarray]:
    """A sparse form's arrays, (N, M, K of the form)."""
    shape = (*ids_NMK.shape[:2], form.k)
    ids, prob = (a[..., : form.k].reshape(-1, form.k) for a in (ids_NMK, prob_NMK))
    ids, prob = labels.hybrid_order(ids, prob)
    values = {"ids": ids.astype(labels.id_dtype(CLASSES)).reshape(shape)}
    if form.kind == "topk":
        values[form.value_field] = labels.encode_probabilities(form, prob).reshape(shape)
    return values


def columns(made: Labels) -> writer.ImageColumns:
    """A list of images with names like ImageNet's."""
    keys = _keys(made.images)
    return writer.ImageColumns(
        keys=keys,
        class_N=np.arange(made.images, dtype=np.int32) % CLASSES,
        size_N2=made.size_N2,
        bytes_N=np.random.default_rng(0).integers(60_000, 160_000, made.images),
        class_names=[f"n{1_440_764 + 17 * c:08}" for c in range(CLASSES)],
        rejected=[],
        fingerprint="0" * 64,
    )


def _keys(images: int) -> list[str]:
    return [f"n{1_440_764 + 17 * (k % CLASSES):08}/ILSVRC_{k:08}.JPEG" for k in range(images)]


def fkd_state(made: Labels, row: int, k: int) -> list[np.ndarray]:
    """Content of FKD's file of an image: [coordinates, flips, (class, probability)].

    float32 (M, 4) fractions, bool (M,), float32 (M, 2, K); `torch.save` of this list is its file.
    """
    size = made.size_N2[row : row + 1]
    drawn = crops.sample(
        CropDistribution(),
        seed=0,
        image_id_N=crops.image_ids([_keys(made.images)[row]]),
        size_N2=size,
        crops_M=np.arange(made.crops),
    )
    height, width = size[0].astype(np.float32)
    share = drawn.box_NM4[0] / np.array([height, width, height, width], dtype=np.float32)
    kept = np.stack([made.ids_NMK[row, :, :k], made.prob_NMK[row, :, :k]], axis=1)
    return [share.astype(np.float32), drawn.flip_NM[0], kept.astype(np.float32)]
