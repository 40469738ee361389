"""The numbers of an analysis, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Change:
    """What a target does to the stored label, as means over crops.

    Attributes:
        total_variation: half the sum of absolute differences.
        divergence: KL(stored || target); infinite where a target gives a class nothing.
    """

    total_variation: float
    divergence: float


@dataclass(frozen=True)
class Band:
    """Crops whose confidence (or area) lies in [low, high)."""

    low: float
    high: float
    crops: int
    confidence: float
    agreement: float


@dataclass(frozen=True)
class SourceAnalysis:
    """One source's labels.

    Attributes:
        exact: every probability is stored; else the rest is spread evenly, which gives the largest
            entropy that the kept probabilities allow.
        entropy_histogram: crops by entropy, `BINS` equal steps of 0..ln C.
        top1_histogram: crops by largest probability, `BINS` equal steps of 0..1.
        kept: K to (mean, 10th percentile) of the probability of the K most probable classes.
        agreement: share of crops whose first choice is the image's class; NaN without classes.
        calibration_error: mean |confidence - agreement| over ten bands, weighted by crops.
        unsure: share of crops whose first choice is below `measures.UNSURE`.
        elsewhere: of crops with a surer choice that is not the image's class.
        background: of unsure crops that give the image's class less than `measures.ABSENT`.
        by_confidence, by_area: ten bands each; area is the crop's share of its image.
        changes: by target, against the stored label; empty unless `exact`.
    """

    name: str
    form: str
    exact: bool
    entropy: float
    top1: float
    entropy_histogram: tuple[int, ...]
    top1_histogram: tuple[int, ...]
    kept: dict[int, tuple[float, float]]
    agreement: float
    calibration_error: float
    unsure: float
    elsewhere: float
    background: float
    by_confidence: tuple[Band, ...]
    by_area: tuple[Band, ...]
    changes: dict[str, Change]


@dataclass(frozen=True)
class ClassAnalysis:
    """Crops of the images of one class, as the first source labels them."""

    name: str
    crops: int
    agreement: float
    top1: float
    entropy: float
    background: float


@dataclass(frozen=True)
class Analysis:
    """Numbers of some crops of a store.

    Attributes:
        kinds: one-hot, hard, each source, each model; of a single source also the smoothing, MS:K
            (marginal smoothing) and MR:K (marginal renormalisation) labels that it serves.
        distance_AA: float64; row a, column b is the mean of -sum P_b log P_a (FKD equation 2,
            a -> b). NaN where a is one-hot or hard, which give nothing to other classes.
        distance_CAA: the same over crops of each class; NaN for classes without crops.
    """

    url: str
    images: int
    crops: int
    class_names: tuple[str, ...]
    sources: tuple[SourceAnalysis, ...]
    classes: tuple[ClassAnalysis, ...]
    kinds: tuple[str, ...]
    distance_AA: np.ndarray
    distance_CAA: np.ndarray

    def distances_by_class(self) -> dict[str, np.ndarray]:
        """(A, A) of each class that has crops."""
        named = dict(zip(self.class_names, self.distance_CAA, strict=True))
        return {c.name: named[c.name] for c in self.classes}

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; null where a number is not defined or infinite."""
        return {
            "images": self.images,
            "crops": self.crops,
            "sources": {source.name: _plain(source.__dict__) for source in self.sources},
            "classes": [_plain(c.__dict__) for c in self.classes],
            "distances": {
                "kinds": list(self.kinds),
                "mean": _plain(self.distance_AA.tolist()),
                "classes": {c: _plain(d.tolist()) for c, d in self.distances_by_class().items()},
            },
        }


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (Band, Change)):
        return _plain(value.__dict__)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
