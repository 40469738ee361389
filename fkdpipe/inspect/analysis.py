"""Analysis of the labels of a store: distributions, agreement, reliability, distances.

Follows sections 3.2 and 3.5 of "A Fast Knowledge Distillation Framework for Visual Recognition"
(FKD). Labels are streamed block by block into sums and histograms, so memory use does not depend on
the size of the store. `measures` has the metrics of single labels.

Letters: B crops of a block, C classes, A kinds of labels, S histogram bins, K kept classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fkdpipe.common.progress import Reporter, silent
from fkdpipe.inspect.measures import (
    UNSURE,
    background,
    cross_entropy,
    divergence,
    entropy,
    log_guess,
    total_variation,
)
from fkdpipe.inspect.results import Analysis, Band, Change, ClassAnalysis, SourceAnalysis
from fkdpipe.inspect.sources import Labels, Opened, blocks
from fkdpipe.storage import labels as forms
from fkdpipe.storage.labels import Target

BINS = 50  # of histograms over [0, 1] and [0, ln C]
FINE_BINS = 1000  # for percentiles

KEPT = (1, 2, 3, 5, 10, 20, 50, 100)
SERVED_K = 5  # of the label kinds compared, as in the paper
AREA_EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# Maps (rows_I, crops_m) to float32 (I, m, C): predictions of a model on recorded crops.
Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]


def analyse(
    opened: Opened,
    rows_N: np.ndarray,
    crops_M: np.ndarray,
    *,
    models: Sequence[tuple[str, Predict]] = (),
    reporter: Reporter = silent,
) -> Analysis:
    """Analyse the labels of some crops.

    Args:
        rows_N: sorted rows with labels (`sources.sample_rows`). crops_M: sorted crops.
        models: name and predictions of each model to compare.
    """
    tallies = [_SourceTally(source, opened.classes) for source in opened.labels]
    served = _served(opened)
    names = [*(source.name for source in opened.labels), *(name for name, _ in models), *served]
    distances = _DistanceTally(names, opened.classes)
    classes = _ClassTally(opened.classes)
    with reporter.task("analyse", len(rows_N) * len(crops_M), "crops") as advance:
        for rows_I, crops_m in blocks(opened, rows_N, crops_M):
            truth_B = np.repeat(opened.truth_N[rows_I], len(crops_m))
            area_B = _area(opened, rows_I, crops_m)
            labels = [source.take(rows_I, crops_m) for source in opened.labels]
            labels += [predict(rows_I, crops_m) for _, predict in models]
            flat = [prob.reshape(-1, opened.classes) for prob in labels]
            flat += [forms.dense_target(target, flat[0]) for target in served.values()]
            for tally, prob_BC in zip(tallies, flat, strict=False):
                tally.add(prob_BC, truth_B, area_B)
            classes.add(flat[0], truth_B)
            distances.add(flat, truth_B)
            advance(len(truth_B))
    return Analysis(
        url=opened.store.url,
        images=len(rows_N),
        crops=len(rows_N) * len(crops_M),
        class_names=opened.class_names,
        sources=tuple(tally.result() for tally in tallies),
        classes=classes.result(opened.class_names),
        kinds=distances.kinds,
        distance_AA=distances.mean(),
        distance_CAA=distances.by_class(),
    )


def _area(opened: Opened, rows_I: np.ndarray, crops_m: np.ndarray) -> np.ndarray:
    """float64 (B,): area of each crop as a fraction of its image."""
    box_Im4 = opened.boxes.take(rows_I, crops_m).box_NM4
    size = opened.store.images.size_N2[rows_I].astype(np.float64)
    area = box_Im4[..., 2].astype(np.float64) * box_Im4[..., 3]
    return (area / size.prod(axis=1)[:, None]).reshape(-1)


@dataclass
class _Bands:
    """Sums over equal bands of [0, 1]."""

    sums: np.ndarray = field(default_factory=lambda: np.zeros((len(AREA_EDGES) - 1, 3)))

    def add(self, value_B: np.ndarray, confidence_B: np.ndarray, agrees_B: np.ndarray) -> None:
        bands = len(self.sums)
        band_B = np.minimum((value_B * bands).astype(np.int64), bands - 1)
        for column, value in enumerate((np.ones_like(confidence_B), confidence_B, agrees_B)):
            self.sums[:, column] += np.bincount(band_B, value, minlength=bands)

    def result(self) -> tuple[Band, ...]:
        return tuple(
            Band(low, high, int(n), _share(sure, n), _share(agree, n))
            for low, high, (n, sure, agree) in zip(
                AREA_EDGES[:-1], AREA_EDGES[1:], self.sums, strict=True
            )
        )


class _SourceTally:
    def __init__(self, source: Labels, classes: int) -> None:
        self.source, self.classes = source, classes
        top = classes if source.exact else source.form.k
        self.kept_K = [k for k in KEPT if k <= top]
        self.entropy = np.zeros(BINS, dtype=np.int64)
        self.top1 = np.zeros(BINS, dtype=np.int64)
        self.kept_KS = np.zeros((len(self.kept_K), FINE_BINS), dtype=np.int64)
        self.kept_sum = np.zeros(len(self.kept_K))
        self.sums = {"entropy": 0.0, "top1": 0.0, "agrees": 0.0}
        self.odd = {"unsure": 0, "elsewhere": 0, "background": 0}
        self.crops = self.known = 0
        self.confidence, self.area = _Bands(), _Bands()
        self.targets = _targets(classes) if source.exact and source.form.kind != "hard" else []
        self.changes = np.zeros((len(self.targets), 2))

    def add(self, prob_BC: np.ndarray, truth_B: np.ndarray, area_B: np.ndarray) -> None:
        entropy_B = entropy(prob_BC)
        top1_B = prob_BC.max(axis=1).astype(np.float64)
        self.crops += len(prob_BC)
        self.sums["entropy"] += entropy_B.sum()
        self.sums["top1"] += top1_B.sum()
        self.entropy += _histogram(entropy_B / max(math.log(self.classes), 1e-12), BINS)
        self.top1 += _histogram(top1_B, BINS)
        most = max(self.kept_K, default=0)
        mass_BK = np.cumsum(-np.sort(-prob_BC, axis=1)[:, :most], axis=1, dtype=np.float64)
        for index, k in enumerate(self.kept_K):
            self.kept_KS[index] += _histogram(mass_BK[:, k - 1], FINE_BINS)
            self.kept_sum[index] += np.minimum(mass_BK[:, k - 1], 1.0).sum()
        self.odd["unsure"] += int((top1_B < UNSURE).sum())
        for index, target in enumerate(self.targets):
            changed = forms.dense_target(target, prob_BC)
            self.changes[index] += (
                total_variation(prob_BC, changed).sum(),
                divergence(prob_BC, changed).sum(),
            )
        self._against_truth(prob_BC, truth_B, area_B, top1_B)

    def _against_truth(
        self, prob_BC: np.ndarray, truth_B: np.ndarray, area_B: np.ndarray, top1_B: np.ndarray
    ) -> None:
        known = truth_B >= 0
        agrees_B = prob_BC.argmax(axis=1) == truth_B
        agreed = agrees_B.astype(np.float64)
        self.known += int(known.sum())
        self.sums["agrees"] += agreed[known].sum()
        unsure = top1_B < UNSURE
        self.odd["elsewhere"] += int((known & ~unsure & ~agrees_B).sum())
        self.odd["background"] += int((known & background(prob_BC, truth_B)).sum())
        self.confidence.add(top1_B[known], top1_B[known], agreed[known])
        self.area.add(area_B[known], top1_B[known], agreed[known])

    def result(self) -> SourceAnalysis:
        by_confidence = self.confidence.result()
        gaps = sum(
            band.crops * abs(band.confidence - band.agreement)
            for band in by_confidence
            if band.crops
        )
        return SourceAnalysis(
            name=self.source.name,
            form=str(self.source.form),
            exact=self.source.exact,
            entropy=_share(self.sums["entropy"], self.crops),
            top1=_share(self.sums["top1"], self.crops),
            entropy_histogram=tuple(self.entropy.tolist()),
            top1_histogram=tuple(self.top1.tolist()),
            kept={
                k: (_share(self.kept_sum[index], self.crops), _percentile(self.kept_KS[index], 0.1))
                for index, k in enumerate(self.kept_K)
            },
            agreement=_share(self.sums["agrees"], self.known),
            calibration_error=_share(gaps, self.known),
            unsure=_share(self.odd["unsure"], self.crops),
            elsewhere=_share(self.odd["elsewhere"], self.known),
            background=_share(self.odd["background"], self.known),
            by_confidence=by_confidence,
            by_area=self.area.result(),
            changes={
                str(target): Change(_share(tv, self.crops), _share(kl, self.crops))
                for target, (tv, kl) in zip(self.targets, self.changes, strict=True)
            },
        )


def _targets(classes: int) -> list[Target]:
    """Targets to compare with the stored label: every kind, with several K."""
    few = [k for k in (1, 5, 10, 50) if k < classes]
    return [
        Target("hard"),
        Target("smoothing"),
        *(Target("marginal-smoothing", k) for k in few if k > 1),
        *(Target("marginal-renorm", k) for k in few if k > 1),
    ]


def _served(opened: Opened) -> dict[str, Target]:
    """Other label kinds that a single source serves; MS and MR are marginal smoothing and renorm.

    Several sources are compared with each other instead.
    """
    form = opened.labels[0].form
    top = form.k if form.sparse else opened.classes
    k = min(SERVED_K, top, opened.classes - 1)
    if len(opened.labels) > 1 or top < 2:
        return {}
    served = {"smoothing": Target("smoothing")}
    if 1 < k < top:  # for k = top this is the stored label itself
        served[f"MS:{k}"] = Target("marginal-smoothing", k)
    if k > 1:
        served[f"MR:{k}"] = Target("marginal-renorm", k)
    return served


class _ClassTally:
    def __init__(self, classes: int) -> None:
        self.sums_C5 = np.zeros((classes, 5))

    def add(self, prob_BC: np.ndarray, truth_B: np.ndarray) -> None:
        known = truth_B >= 0
        prob, truth = prob_BC[known], truth_B[known]
        columns = (
            np.ones(len(truth)),
            (prob.argmax(axis=1) == truth).astype(np.float64),
            prob.max(axis=1).astype(np.float64),
            entropy(prob),
            background(prob, truth).astype(np.float64),
        )
        for index, values in enumerate(columns):
            self.sums_C5[:, index] += np.bincount(truth, values, minlength=len(self.sums_C5))

    def result(self, names: Sequence[str]) -> tuple[ClassAnalysis, ...]:
        return tuple(
            ClassAnalysis(name, int(sums[0]), *(float(value / sums[0]) for value in sums[1:]))
            for name, sums in zip(names, self.sums_C5, strict=True)
            if sums[0]
        )


class _DistanceTally:
    """Sums of cross-entropies by the class of the image; the last row is for images without."""

    def __init__(self, names: Sequence[str], classes: int) -> None:
        self.kinds = ("one-hot", "hard", *names)
        count = len(self.kinds)
        self.sums_CAA = np.zeros((classes + 1, count, count))
        self.crops_C = np.zeros(classes + 1)

    def add(self, prob: Sequence[np.ndarray], truth_B: np.ndarray) -> None:
        """Add a block.

        Args:
            prob: (B, C) of each source, then of each model, then of other kinds of labels.
        """
        classes = len(self.crops_C) - 1
        group_B = np.where(truth_B >= 0, truth_B, classes)
        self.crops_C += np.bincount(group_B, minlength=classes + 1)
        hard_B = prob[0].argmax(axis=1)
        rows = np.arange(len(truth_B))
        for a, guess_BC in enumerate(prob):
            log_BC = log_guess(guess_BC)
            to_truth = np.where(truth_B >= 0, -log_BC[rows, np.maximum(truth_B, 0)], np.nan)
            to_all = [to_truth, -log_BC[rows, hard_B]]
            to_all += [cross_entropy(target_BC, log_BC) for target_BC in prob]
            for b, value in enumerate(to_all):
                self.sums_CAA[:, a + 2, b] += np.bincount(
                    group_B, value.astype(np.float64), minlength=classes + 1
                )

    def mean(self) -> np.ndarray:
        known = self.sums_CAA[:-1].sum(axis=0) / max(self.crops_C[:-1].sum(), 1)
        total = self.sums_CAA.sum(axis=0) / max(self.crops_C.sum(), 1)
        total[:, 0] = known[:, 0] if self.crops_C[:-1].sum() else np.nan
        total[:2] = np.nan  # one-hot and hard cannot be predictions
        return total

    def by_class(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            mean = self.sums_CAA[:-1] / self.crops_C[:-1, None, None]
        mean[:, :2] = np.nan
        return mean


def _histogram(share_B: np.ndarray, bins: int) -> np.ndarray:
    bin_B = np.clip((share_B * bins).astype(np.int64), 0, bins - 1)
    return np.bincount(bin_B, minlength=bins)


def _percentile(histogram: np.ndarray, share: float) -> float:
    """The lower edge of the bin that contains a percentile."""
    if not histogram.sum():
        return math.nan
    index = int(np.searchsorted(np.cumsum(histogram), share * histogram.sum()))
    return index / len(histogram)


def _share(total: float, count: float) -> float:
    return float(total / count) if count else math.nan
