"""Forms (what a store keeps of a teacher's output) and targets (what a student is trained on).

    form            kept per crop                                serves
    full            C log-probabilities, float16                 every target
    logits          C scores before softmax, float16             every target, any temperature
    topk:K          K classes and probabilities                  hard, smoothing, marginal-* up to K
    topk:K:compact  the same, probabilities in one byte each     the same
    hard            the class of the largest probability         hard

The targets are equations 3 to 7 of "A Fast Knowledge Distillation Framework for Visual
Recognition" (FKD). Equation 5 as printed is ambiguous; outside the Top-K it is
(1 - sum of the Top-K) / (C - K), as in the authors' code.

For each crop, sparse labels hold the teacher's top class first, then the other kept classes in
order of class id, which halves the size of the stored ids. Letters: B rows, C classes, K kept
classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fkdpipe.common.errors import StoreMismatchError, UsageError

FormKind = Literal["full", "logits", "topk", "hard"]
TargetKind = Literal[
    "ground-truth", "full", "hard", "smoothing", "marginal-smoothing", "marginal-renorm"
]

LOWEST = -60_000.0  # float16 reaches down to -65504; e**-60000 is zero in any precision
_HALF_ULP = 2.0**-11  # relative rounding error of float16
_STICK_STEPS = 255


@dataclass(frozen=True)
class Form:
    """What is stored of an output; written `full`, `logits`, `hard`, `topk:K`, `topk:K:compact`.

    Attributes:
        k: classes kept; 1 for `hard`, 0 if all are kept.
        compact: probabilities as one byte each (stick-breaking code) instead of float16.
    """

    kind: FormKind
    k: int = 0
    compact: bool = False

    def __str__(self) -> str:
        if self.kind != "topk":
            return self.kind
        return f"topk:{self.k}:compact" if self.compact else f"topk:{self.k}"

    @property
    def sparse(self) -> bool:
        return self.kind in ("topk", "hard")

    @property
    def value_field(self) -> str:
        """Name of the array of probabilities or scores; `hard` has none."""
        names = {"full": "log_prob", "logits": "logit"}
        return names.get(self.kind, "stick" if self.compact else "prob")


@dataclass(frozen=True)
class Target:
    """What a student learns; written `full`, `hard`, `smoothing`, `marginal-smoothing:K`,
    `marginal-renorm:K` or `ground-truth`."""

    kind: TargetKind
    k: int = 0

    def __post_init__(self) -> None:
        numbered = str(self.kind).startswith("marginal")
        if self.kind not in get_args(TargetKind) or (self.k > 0) != numbered:
            raise UsageError(
                f"kind {self.kind!r} with k = {self.k!r} is not a target; the targets are "
                "ground-truth, full, hard, smoothing, marginal-smoothing:K and marginal-renorm:K "
                "(for example marginal-smoothing:5)."
            )

    def __str__(self) -> str:
        return f"{self.kind}:{self.k}" if self.kind.startswith("marginal") else self.kind


@dataclass(frozen=True)
class SparseLabels:
    """Kept classes of B crops; the other classes share the remaining probability evenly.

    Attributes:
        ids_BK: int64 classes.
        prob_BK: float32, non-negative, sums to at most 1 with the rest.
        rest_B: float32, probability of all other classes together.
    """

    ids_BK: np.ndarray
    prob_BK: np.ndarray
    rest_B: np.ndarray


def parse_form(text: str) -> Form:
    """Parse a form; raises UsageError that lists the valid forms."""
    name, *rest = text.split(":")
    if name in ("full", "logits") and not rest:
        return Form("full" if name == "full" else "logits")
    if name == "hard" and not rest:
        return Form("hard", 1)
    numbered = bool(rest) and rest[0].isdigit() and int(rest[0]) > 0
    if name == "topk" and numbered and rest[1:] in ([], ["compact"]):
        return Form("topk", int(rest[0]), compact=len(rest) == 2)
    raise UsageError(
        f"{text!r} is not a form; the forms are full, logits, hard, topk:K and topk:K:compact "
        "(for example topk:10)."
    )


def parse_target(text: str) -> Target:
    """Parse a target; raises UsageError that lists the valid targets."""
    name, _, k = text.partition(":")
    if name in ("ground-truth", "full", "hard", "smoothing") and not k:
        return Target(name)  # type: ignore[arg-type]
    if name in ("marginal-smoothing", "marginal-renorm") and k.isdigit() and int(k) > 0:
        return Target(name, int(k))  # type: ignore[arg-type]
    raise UsageError(
        f"{text!r} is not a target; the targets are ground-truth, full, hard, smoothing, "
        "marginal-smoothing:K and marginal-renorm:K (for example marginal-smoothing:5)."
    )


def check_form(form: Form, classes: int) -> None:
    """Raises UsageError if K exceeds the teacher's number of classes."""
    if form.sparse and form.k > classes:
        raise UsageError(
            f"form {form}: the teacher has {classes} classes, fewer than {form.k}. Use "
            f"topk:{classes} or less, or full."
        )


def check_target(form: Form, target: Target, classes: int) -> None:
    """Refuse a target that a store of this form cannot serve.

    Raises:
        UsageError: K exceeds the number of classes.
        StoreMismatchError: the form holds too little; the message lists the targets it serves.
    """
    if target.k > classes:
        raise UsageError(f"target {target}: there are {classes} classes, fewer than {target.k}.")
    if target.kind == "ground-truth" or form.kind in ("full", "logits"):
        return
    needed = {"hard": 1, "smoothing": 1}.get(target.kind, target.k)
    poor = form.kind == "hard" and target.kind != "hard"
    if poor or target.kind == "full" or needed > form.k:
        raise StoreMismatchError(
            f"a store of form {form} cannot serve target {target}; it serves "
            f"{', '.join(served_targets(form))}.",
            code="form-too-poor",
        )


def served_targets(form: Form) -> list[str]:
    """The targets that a form serves, as text for messages."""
    if form.kind == "hard":
        return ["hard"]
    sparse = ["hard", "smoothing"]
    if form.kind == "topk":
        upto = f"K<={form.k}"
        return [*sparse, f"marginal-smoothing ({upto})", f"marginal-renorm ({upto})"]
    return ["full", *sparse, "marginal-smoothing (any K)", "marginal-renorm (any K)"]


def error_bound(form: Form, classes: int) -> float:
    """Largest total variation between the stored label and the exact one of the same form.

    float16 keeps 11 bits of each probability (log-probabilities: of the exponent, hence ln C);
    the stick-breaking byte is off by at most pi/1020 per step. docs/format.md derives them.
    """
    if form.kind == "hard":
        return 0.0
    if form.kind == "topk":
        if form.compact:
            return form.k * math.pi / (4 * _STICK_STEPS)
        return 2 * _HALF_ULP + form.k * 2.0**-24
    return 1.1 * _HALF_ULP * math.log(max(classes, 2)) + 2.0**-20


def hybrid_order(ids_BK: np.ndarray, prob_BK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reorder rows sorted by probability: the top class stays first, the rest go by class id."""
    order = np.argsort(ids_BK[:, 1:], axis=1, kind="stable") + 1
    order = np.concatenate([np.zeros((len(order), 1), dtype=order.dtype), order], axis=1)
    return np.take_along_axis(ids_BK, order, 1), np.take_along_axis(prob_BK, order, 1)


def id_dtype(classes: int) -> np.dtype:
    """uint16 if every class id is below the fill value 65535, else uint32."""
    return np.dtype(np.uint16 if classes <= 65_535 else np.uint32)


def encode_probabilities(form: Form, prob_BK: np.ndarray) -> np.ndarray:
    """float16, or uint8 in the compact code, of probabilities in stored order."""
    if not form.compact:
        return prob_BK.astype(np.float16)
    prob = prob_BK.astype(np.float64)
    before = np.cumsum(prob, axis=1) - prob
    left = np.maximum(1.0 - before, 0.0)
    share = np.clip(np.divide(prob, left, out=np.zeros_like(prob), where=left > 0), 0.0, 1.0)
    return np.rint(np.arcsin(np.sqrt(share)) * (_STICK_STEPS / (np.pi / 2))).astype(np.uint8)


def decode_probabilities(form: Form, stored_BK: np.ndarray) -> np.ndarray:
    """float32 probabilities in stored order, never negative, sum at most 1."""
    if form.compact:
        share = _STICK_TABLE[stored_BK]
        left = np.cumprod(1.0 - share, axis=1)
        left = np.concatenate([np.ones_like(left[:, :1]), left[:, :-1]], axis=1)
        return (share * left).astype(np.float32)
    prob = stored_BK.astype(np.float32)
    total = prob.sum(axis=1, keepdims=True, dtype=np.float32)
    return prob / np.maximum(total, 1.0)


_STICK_TABLE = np.sin(np.arange(_STICK_STEPS + 1) * (np.pi / 2 / _STICK_STEPS)) ** 2


def encode_scores(scores_BC: np.ndarray) -> np.ndarray:
    """float16 scores (log-probabilities, or logits minus their maximum), finite."""
    return np.maximum(scores_BC, LOWEST).astype(np.float16)


def sparse_target(
    target: Target, ids_BK: np.ndarray, prob_BK: np.ndarray, classes: int
) -> SparseLabels:
    """A target from stored sparse labels.

    Args:
        ids_BK: in stored order.
        prob_BK: decoded probabilities in stored order; ignored for `hard`.
        classes: C.
    """
    ids = ids_BK.astype(np.int64)
    if target.kind == "hard":
        ones = np.ones((len(ids), 1), dtype=np.float32)
        return SparseLabels(ids[:, :1], ones, np.zeros(len(ids), dtype=np.float32))
    k = 1 if target.kind == "smoothing" else target.k
    if k < ids.shape[1]:
        rank = prob_BK.astype(np.float32, copy=True)
        rank[:, 0] = np.inf  # the top class stays first, even if quantisation made a tie
        keep = np.argsort(-rank, axis=1, kind="stable")[:, :k]
        ids, prob = np.take_along_axis(ids, keep, 1), np.take_along_axis(prob_BK, keep, 1)
    else:
        prob = prob_BK
    prob = prob.astype(np.float32, copy=False)
    total_B = prob.sum(axis=1, dtype=np.float32)
    if target.kind == "marginal-renorm":
        even = np.float32(1 / k)  # all kept probabilities rounded to zero
        prob = np.where(total_B[:, None] > 0, prob / np.maximum(total_B[:, None], 1e-30), even)
        rest_B = np.zeros(len(ids), dtype=np.float32)
    elif k == classes:  # there is no other class to take the rest
        prob = prob / np.maximum(total_B[:, None], 1e-30)
        rest_B = np.zeros(len(ids), dtype=np.float32)
    else:
        rest_B = np.maximum(np.float32(1.0) - total_B, 0.0)
    return SparseLabels(ids, prob, rest_B)


def softmax(scores_BC: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float32 probabilities of stored scores; for `full` this also renormalises."""
    z = scores_BC.astype(np.float32) / np.float32(temperature)
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


def top_k(prob_BC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most probable classes, most probable first, ties by class id."""
    ids = np.argsort(-prob_BC, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(prob_BC, ids, 1)


def to_dense(labels: SparseLabels, classes: int) -> np.ndarray:
    """float32 (B, C): each row sums to 1."""
    kept = labels.ids_BK.shape[1]
    share_B = labels.rest_B / max(classes - kept, 1)
    dense = np.repeat(share_B[:, None], classes, axis=1).astype(np.float32)
    np.put_along_axis(dense, labels.ids_BK, labels.prob_BK, axis=1)
    return dense


def dense_target(target: Target, prob_BC: np.ndarray) -> np.ndarray:
    """float32 (B, C): a target from all probabilities (forms `full` and `logits`)."""
    if target.kind == "full":
        return prob_BC
    classes = prob_BC.shape[1]
    ids, prob = top_k(prob_BC, max(target.k, 1))
    return to_dense(sparse_target(target, ids, prob, classes), classes)
