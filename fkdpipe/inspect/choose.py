"""Select crops to show: by image, by class, or by their labels.

Letters: I images, m crops of each, B crops, C classes.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fkdpipe.common.errors import StoreError, UsageError
from fkdpipe.common.progress import Reporter, silent
from fkdpipe.inspect.measures import FLOOR, entropy, total_variation
from fkdpipe.inspect.sources import Opened, blocks

Order = Literal["stored", "sure", "unsure", "entropy", "worst", "disagreement"]


@dataclass(frozen=True)
class Choice:
    """Selection of crops to show.

    Attributes:
        image: key of one image. class_name: only images of one class.
        by: `stored` uses the store's order, which is random; the others rank crops: `sure` and
            `unsure` by confidence, `entropy` by entropy, `worst` by the cross-entropy with the
            image's class, `disagreement` by total variation between two sources.
        count: number of images. crops: crops per image; ranked crops are one per image unless
            `image` is set.
    """

    image: str | None = None
    class_name: str | None = None
    by: Order = "stored"
    count: int = 12
    crops: int = 4

    def __post_init__(self) -> None:
        if self.by not in get_args(Order):
            raise UsageError(
                f"crops can be ordered by {', '.join(get_args(Order))}; found {self.by!r}."
            )
        if self.count < 1 or self.crops < 1:
            raise UsageError("show at least 1 image and 1 crop.")


@dataclass(frozen=True)
class Chosen:
    """Selected crops of one image. score: ranking score of the first one, None if unranked."""

    row: int
    crops: tuple[int, ...]
    score: float | None = None


def one_crop(opened: Opened, text: str) -> Chosen:
    """The crop written `KEY:INDEX`.

    Raises:
        UsageError: invalid form. StoreError: no such image or crop.
    """
    key, colon, index = text.rpartition(":")
    if not colon or not key or not index.isdigit():
        raise UsageError(f"{text!r}: write a crop as KEY:INDEX, for example cat/1.jpg:0.")
    count = opened.finished.crops_per_image
    if int(index) >= count:
        raise StoreError(
            f"{opened.store.url} has crops 0 to {count - 1} of each image; found {index}.",
            code="no-crop",
        )
    return Chosen(row_of(opened, key), (int(index),))


def row_of(opened: Opened, key: str) -> int:
    """The row of an image with labels.

    Raises:
        StoreError: no such image (with close matches), or it has no labels (with the reason).
    """
    keys = opened.store.images.keys
    matches = np.flatnonzero(keys == key)
    if not len(matches):
        near = difflib.get_close_matches(key, keys.tolist(), n=3, cutoff=0.5)
        hint = f"Did you mean {', '.join(near)}?" if near else f"One of its images is {keys[0]}."
        raise StoreError(f"{opened.store.url} has no image {key!r}. {hint}", code="no-image")
    row = int(matches[0])
    if row in opened.finished.failed:
        code, detail = opened.finished.failed[row]
        raise StoreError(f"{key} has no labels: {code}, {detail}.", code="no-labels")
    if row not in opened.finished.rows:
        raise StoreError(f"{key} is not labelled yet.", code="no-labels")
    return row


def choose(
    opened: Opened, choice: Choice, rows_N: np.ndarray, *, reporter: Reporter = silent
) -> list[Chosen]:
    """Select crops, highest score first.

    Args:
        rows_N: images to search, unless the choice names one (`sources.sample_rows`).

    Raises:
        StoreError: no such image or class, or the order needs data that the store does not have.
    """
    if choice.image is not None:
        rows_N = np.array([row_of(opened, choice.image)])
    if choice.class_name is not None:
        rows_N = rows_N[opened.truth_N[rows_N] == _class_of(opened, choice.class_name)]
        if not len(rows_N):
            raise StoreError(
                f"none of the searched images is of class {choice.class_name!r}; search more with "
                "--limit.",
                code="no-image",
            )
    crops_M = np.arange(opened.finished.crops_per_image)
    if choice.by == "stored":
        first = tuple(crops_M[: choice.crops].tolist())
        return [Chosen(int(row), first) for row in rows_N[: choice.count]]
    _check_order(opened, choice.by)
    score_NM = np.full((len(rows_N), len(crops_M)), -np.inf, dtype=np.float32)
    with reporter.task("look", len(rows_N) * len(crops_M), "crops") as advance:
        for rows_I, crops_m in blocks(opened, rows_N, crops_M):
            score_Im = _score(opened, choice.by, rows_I, crops_m)
            score_NM[np.ix_(np.searchsorted(rows_N, rows_I), crops_m)] = score_Im
            advance(score_Im.size)
    if choice.image is not None:
        best = np.argsort(-score_NM[0], kind="stable")[: choice.crops]
        return [Chosen(int(rows_N[0]), tuple(best.tolist()), float(score_NM[0, best[0]]))]
    best_N = score_NM.argmax(axis=1)
    top_N = score_NM[np.arange(len(rows_N)), best_N]
    order = np.argsort(-top_N, kind="stable")[: choice.count]
    return [Chosen(int(rows_N[k]), (int(best_N[k]),), float(top_N[k])) for k in order]


def _class_of(opened: Opened, name: str) -> int:
    if (opened.truth_N < 0).all():
        raise StoreError("the images of this store have no classes.", code="no-classes")
    if name not in opened.class_names:
        near = difflib.get_close_matches(name, opened.class_names, n=3, cutoff=0.5)
        some = ", ".join(opened.class_names[:8])
        more = ", ..." if len(opened.class_names) > 8 else ""
        hint = f"Did you mean {', '.join(near)}?" if near else f"It has {some}{more}."
        raise StoreError(f"{opened.store.url} has no class {name!r}. {hint}", code="no-class")
    return opened.class_names.index(name)


def _check_order(opened: Opened, by: Order) -> None:
    if by == "worst" and (opened.truth_N < 0).all():
        raise StoreError(
            "order worst ranks crops by the probability of their image's class, but the images of "
            "this store have no classes.",
            code="no-classes",
        )
    if by == "disagreement" and len(opened.labels) != 2:
        raise UsageError("order disagreement needs two sources; name two with --source.")


def _score(opened: Opened, by: Order, rows_I: np.ndarray, crops_m: np.ndarray) -> np.ndarray:
    """float32 (I, m) ranking scores."""
    prob_ImC = opened.labels[0].take(rows_I, crops_m)
    if by in ("sure", "unsure"):
        top_Im = prob_ImC.max(axis=-1)
        return top_Im if by == "sure" else -top_Im
    if by == "entropy":
        return entropy(prob_ImC).astype(np.float32)
    if by == "worst":
        truth_I = opened.truth_N[rows_I]
        true_Im = prob_ImC[np.arange(len(rows_I)), :, np.maximum(truth_I, 0)]
        worst_Im = -np.log(np.maximum(true_Im, np.float32(FLOOR)))
        # Break ties by the confidence in another class.
        worst_Im = worst_Im + np.float32(1e-3) * prob_ImC.max(axis=-1)
        return np.where(truth_I[:, None] >= 0, worst_Im, -np.inf).astype(np.float32)
    other_ImC = opened.labels[1].take(rows_I, crops_m)
    return total_variation(prob_ImC, other_ImC).astype(np.float32)
