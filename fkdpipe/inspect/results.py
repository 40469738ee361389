"""Results of an analysis, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Change:
    """Distance of a target from the stored label, mean over crops.

    Attributes:
        total_variation: half the sum of absolute differences.
        divergence: KL(stored || target); infinite if the target of a class is zero.
    """

    total_variation: float
    divergence: float


@dataclass(frozen=True)
class Band:
    """Crops with confidence (or area) in [low, high)."""

    low: float
    high: float
    crops: int
    confidence: float
    agreement: float


@dataclass(frozen=True)
class SourceAnalysis:
    """Results for the labels of one source.

    Attributes:
        exact: all probabilities are stored; else the rest is spread evenly, which maximises the
            entropy given the kept probabilities.
        entropy_histogram: crops by entropy, `BINS` equal bins of [0, ln C].
        top1_histogram: crops by largest probability, `BINS` equal bins of [0, 1].
        kept: by K, (mean, 10th percentile) of the probability of the K most probable classes.
        agreement: share of crops whose top class is the image's class; NaN without classes.
        calibration_error: mean |confidence - agreement| over ten bands, weighted by crops.
        unsure: share of crops whose largest probability is below `measures.UNSURE`.
        elsewhere: share of crops that are not unsure and whose top class is not the image's class.
        background: share of crops that are unsure and have the image's class below
            `measures.ABSENT`.
        by_confidence, by_area: ten bands each; area is relative to the image.
        changes: distance from the stored label by target; empty unless `exact`.
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
    """Results for the crops of one class, from the labels of the first source."""

    name: str
    crops: int
    agreement: float
    top1: float
    entropy: float
    background: float


@dataclass(frozen=True)
class Analysis:
    """Results for some crops of a store.

    Attributes:
        kinds: one-hot, hard, each source, each model; for a single source also the smoothing, MS:K
            (marginal smoothing) and MR:K (marginal renormalisation) labels that it serves.
        distance_AA: float64; row a, column b is the mean of -sum P_b log P_a (FKD equation 2,
            a -> b). NaN where a is one-hot or hard, whose logarithms are infinite.
        distance_CAA: the same for the crops of each class; NaN for classes without crops.
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
        """(A, A) distances of each class that has crops."""
        named = dict(zip(self.class_names, self.distance_CAA, strict=True))
        return {c.name: named[c.name] for c in self.classes}

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible lists and numbers; null for NaN and infinity."""
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
