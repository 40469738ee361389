"""Recorded crops, and the distribution they are drawn from.

Shapes: N images, M crops of each. A box is (top, left, height, width) in integer pixels of the
decoded image, EXIF orientation not applied.

Crops come from a counter-based generator keyed by (seed, image key, crop index, field, draw), so
any process on any machine draws the same crop, in any order. This needs arithmetic that rounds the
same everywhere: only +, -, *, / and square root of IEEE doubles are used. The `exp` of a maths
library is not, since a difference in the last bit can move a crop by a pixel; see `_exp`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from fkdpipe.common import config
from fkdpipe.common.config import Probability
from fkdpipe.common.errors import UsageError

DISTRIBUTION_NAME = "random-resized-crop"
DISTRIBUTION_VERSION = 1
TRIES = 10  # as in torchvision's RandomResizedCrop, which then falls back to a centre crop

_BOX, _FLIP, _JITTER = 0, 1, 2  # one stream of random numbers per recorded field
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


Range = tuple[float, float]


@config.settings
class Jitter:
    """Strengths of recorded colour jitter, as in torchvision's ColorJitter."""

    brightness: Probability = 0.0
    """Factors are drawn from 1 - strength to 1 + strength."""
    contrast: Probability = 0.0
    """Factors are drawn from 1 - strength to 1 + strength."""
    saturation: Probability = 0.0
    """Factors are drawn from 1 - strength to 1 + strength."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Turns of the colour wheel are drawn from -hue to hue."""


@config.settings
class CropDistribution:
    """RandomResizedCrop, a horizontal flip, and optional colour jitter."""

    scale: Range = (0.08, 1.0)
    """Smallest and largest area of the crop as a fraction of the image, above 0 and up to 1."""
    ratio: Range = (3 / 4, 4 / 3)
    """Smallest and largest width / height, drawn log-uniformly."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Jitter | None = None
    """Strengths of colour jitter; by default, none is recorded."""

    @field_validator("scale", "ratio")
    @classmethod
    def _in_order(cls, between: Range, info: ValidationInfo) -> Range:
        (low, high), most = between, 1 if info.field_name == "scale" else 100
        if not 0 < low <= high <= most:
            raise UsageError(f"must satisfy 0 < low <= high <= {most}; found {low}, {high}")
        return between


@dataclass(frozen=True)
class Crops:
    """Recorded crops.

    Attributes:
        box_NM4: uint16, (top, left, height, width) in pixels.
        flip_NM: bool, mirrored horizontally after resizing.
        jitter_NM4: float32, brightness, contrast, saturation, hue (see `colour`), or None.
    """

    box_NM4: np.ndarray
    flip_NM: np.ndarray
    jitter_NM4: np.ndarray | None = None

    def __getitem__(self, index: Any) -> Crops:
        """Index them as an (N, M) array; the result must keep both axes."""
        jitter = None if self.jitter_NM4 is None else self.jitter_NM4[index]
        return Crops(self.box_NM4[index], self.flip_NM[index], jitter)


def join(parts: Sequence[Crops], axis: int = 0) -> Crops:
    """Concatenate crops of different images (axis 0) or more crops of the same images (axis 1)."""
    if len(parts) == 1:
        return parts[0]
    jitters = [part.jitter_NM4 for part in parts if part.jitter_NM4 is not None]
    return Crops(
        np.concatenate([part.box_NM4 for part in parts], axis),
        np.concatenate([part.flip_NM for part in parts], axis),
        np.concatenate(jitters, axis) if jitters else None,
    )


def image_ids(keys: Sequence[str]) -> np.ndarray:
    """uint64 (N,): a 64-bit hash of each image key, with which the generator is keyed."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def sample(
    distribution: CropDistribution,
    *,
    seed: int,
    image_id_N: np.ndarray,
    size_N2: np.ndarray,
    crops_M: np.ndarray,
) -> Crops:
    """Draw crops by index, reproducibly.

    Args:
        seed: any non-negative integer below 2**63.
        image_id_N: uint64 from `image_ids`.
        size_N2: (height, width) of each decoded image.
        crops_M: indices of the crops to draw; crop 7 is the same whatever else is drawn.
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"the seed must be between 0 and 2**63 - 1; found {seed}.")
    state_NM = _states(seed, image_id_N, crops_M)
    box_NM4 = _boxes(distribution, _stream(state_NM, _BOX), np.asarray(size_N2, dtype=np.int64))
    flip_NM = _uniform(_draw(_stream(state_NM, _FLIP), 0)) < distribution.flip
    jitter_NM4 = None if distribution.jitter is None else _factors(distribution.jitter, state_NM)
    return Crops(box_NM4.astype(np.uint16), flip_NM, jitter_NM4)


def sample_jitter(
    jitter: Jitter, *, seed: int, image_id_N: np.ndarray, crops_M: np.ndarray
) -> np.ndarray:
    """float32 (N, M, 4): only the colour factors that `sample` draws."""
    return _factors(jitter, _states(seed, image_id_N, crops_M))


def random_order(seed: int, image_id_N: np.ndarray) -> np.ndarray:
    """int64 (N,): a permutation that depends only on the seed and the images, not their order."""
    rank_N = _mix(_mix(seed) ^ np.asarray(image_id_N, dtype=np.uint64))
    return np.lexsort((image_id_N, rank_N))


def per_class(class_N: np.ndarray, order_N: np.ndarray, share: float) -> np.ndarray:
    """int64: the first ceil(share * n) of the n images of each class, in a given order.

    Args:
        class_N: class of each image; -1 in a flat folder, which counts as one class.
        order_N: a permutation of the images; the result keeps its order.
    """
    classes = class_N[order_N]
    grouped = np.argsort(classes, kind="stable")
    _, first, counts = np.unique(classes[grouped], return_index=True, return_counts=True)
    rank = np.empty(len(grouped), dtype=np.int64)  # within its class
    rank[grouped] = np.arange(len(grouped)) - np.repeat(first, counts)
    quota = np.ceil(share * counts - 1e-9)[np.searchsorted(np.unique(classes), classes)]
    return order_N[rank < quota]


def derive_seed(seed: int, number: int) -> int:
    """A further seed for each number; used for orders and mixing partners."""
    return int(_mix(_mix(seed) ^ np.uint64(number))) >> 2


def boxes_outside(box_NM4: np.ndarray, size_N2: np.ndarray) -> np.ndarray:
    """bool (N, M): which crops are empty or reach outside their image."""
    top, left, height, width = np.moveaxis(box_NM4.astype(np.int64), -1, 0)
    size = size_N2.astype(np.int64)
    return (
        (height < 1)
        | (width < 1)
        | (top + height > size[:, None, 0])
        | (left + width > size[:, None, 1])
    )


def _states(seed: int, image_id_N: np.ndarray, crops_M: np.ndarray) -> np.ndarray:
    """uint64 (N, M): the initial state of each crop's streams."""
    state_N1 = _mix(_mix(seed) ^ np.asarray(image_id_N, dtype=np.uint64))[:, None]
    return _mix(state_N1 ^ _mix(np.asarray(crops_M, dtype=np.uint64) + _GOLDEN))


def _factors(jitter: Jitter, state_NM: np.ndarray) -> np.ndarray:
    """float32 (N, M, 4), uniform around 1, 1, 1 and 0; one stream each."""
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    factors = [
        centre + strength * (2 * _uniform(_draw(_stream(state_NM, _JITTER + k), 0)) - 1)
        for k, (centre, strength) in enumerate(zip((1, 1, 1, 0), strengths, strict=True))
    ]
    return np.stack(factors, axis=-1).astype(np.float32)


def _boxes(distribution: CropDistribution, state_NM: np.ndarray, size_N2: np.ndarray) -> np.ndarray:
    """int64 (N, M, 4), distributed as torchvision.transforms.RandomResizedCrop.get_params."""
    shape = state_NM.shape
    box = _centre(distribution, size_N2)[:, None, :].repeat(shape[1], axis=1).reshape(-1, 4)
    state = state_NM.reshape(-1)
    height, width = (np.broadcast_to(size_N2[:, None, k], shape).reshape(-1) for k in (0, 1))
    open_ = np.arange(state.size)
    log_low = _log(distribution.ratio[0])
    log_span = _log(distribution.ratio[1]) - log_low
    for attempt in range(TRIES):
        H, W, s = height[open_], width[open_], state[open_]
        low, high = distribution.scale
        area = (H * W) * (low + (high - low) * _uniform(_draw(s, 4 * attempt)))
        aspect = _exp(log_low + log_span * _uniform(_draw(s, 4 * attempt + 1)))
        w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
        top = _below(_draw(s, 4 * attempt + 2), np.where(fits, H - h + 1, 1))
        left = _below(_draw(s, 4 * attempt + 3), np.where(fits, W - w + 1, 1))
        box[open_[fits]] = np.stack([top, left, h, w], axis=-1)[fits]
        open_ = open_[~fits]
    return box.reshape(*shape, 4)


def _centre(distribution: CropDistribution, size_N2: np.ndarray) -> np.ndarray:
    """int64 (N, 4): the largest centre crop with an allowed aspect ratio."""
    H, W = size_N2[:, 0], size_N2[:, 1]
    low, high = distribution.ratio
    wide, tall = high * H < W, low * H > W
    h = np.where(tall, np.rint(W / low).astype(np.int64), H)
    w = np.where(wide, np.rint(H * high).astype(np.int64), W)
    h, w = np.minimum(h, H), np.minimum(w, W)
    return np.stack([(H - h) // 2, (W - w) // 2, h, w], axis=-1)


def _mix(x: np.ndarray | int) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014, variant 13 by Stafford): bits to bits."""
    bits: np.ndarray = np.asarray(x, dtype=np.uint64)
    with np.errstate(over="ignore"):  # wraps around on purpose
        bits = np.asarray(bits + _GOLDEN)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(bits ^ (bits >> np.uint64(31)))


def _stream(state: np.ndarray, field: int) -> np.ndarray:
    return _mix(state ^ _mix((field + 1) << 32))


def _draw(state: np.ndarray, counter: int) -> np.ndarray:
    """uint64: draw number `counter` of each stream."""
    return _mix(state + np.uint64(int(_GOLDEN) * (counter + 1) % 2**64))


def _uniform(bits: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _below(bits: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """int64 in [0, limit) from the upper 32 bits (multiply and shift; limit below 2**31)."""
    return ((bits >> np.uint64(32)) * limit.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def _log(x: float) -> float:
    """Natural logarithm, correctly rounded as decimal's `ln`, so the same on every machine."""
    return float(Context(prec=28).ln(Decimal(x)))


def _exp(x: np.ndarray) -> np.ndarray:
    """e**x for |x| < 30, using only basic arithmetic, so the same on every machine.

    x = k ln 2 + r with |r| <= 0.35; a Taylor polynomial of degree 14 is exact to double precision
    there, and the factor 2**k is exact.
    """
    ln2 = 0.6931471805599453
    k = np.rint(x / ln2)
    r = x - k * ln2
    total = np.full_like(r, 1.0)
    for n in range(14, 0, -1):
        total = 1.0 + total * r / n
    return np.ldexp(total, k.astype(np.int32))
