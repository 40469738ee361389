"""Stored labels and features of crops.

They are read window by window, so that wide arrays can be read ahead. A window returns the values
of some of its images as NumPy arrays, image-major: row = image * m + crop. These are copied to the
device as stored and become dense probabilities there (FKD equations 3 to 7).

Letters: I images of a window, m crops of each, B = I * m, C classes, K kept classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fkdpipe.common.errors import StoreMismatchError
from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.networks.features import teachers_differ
from fkdpipe.networks.models import SELF_SUPERVISED
from fkdpipe.storage import features as codes
from fkdpipe.storage import labels as forms
from fkdpipe.storage import reader
from fkdpipe.storage.labels import Target
from fkdpipe.storage.settings import FeatureSettings, LabelSettings
from fkdpipe.storage.store import Store

Values = dict[str, np.ndarray]
Window = Callable[[np.ndarray], Values]  # maps int64 (I,) rows to arrays of B rows by name


def open_labels(
    store: Store,
    segments: Sequence[reader.Segment],
    target: Target,
    temperature: float | None,
    cache_dir: Path,
    advance: Callable[[int], None],
) -> Labels:
    """Labels for a target at a temperature; None keeps the stored temperature.

    Raises:
        StoreMismatchError: the stored form cannot serve the target or the temperature.
    """
    form = reader.label_form(segments)
    settings: LabelSettings = segments[0].part.settings
    classes = settings.classes
    forms.check_target(form, target, classes)
    divisor = reader.check_temperature(segments, temperature)
    if form.sparse:
        return SparseLabels(reader.SparseReader(store, segments, cache_dir, advance), target)
    scores = any(teacher.get("library") in SELF_SUPERVISED for teacher in settings.teachers)
    wide = reader.WideReader(store, segments, form.value_field)
    return DenseLabels(wide, target, classes, divisor, scores)


@dataclass(frozen=True)
class SparseLabels:
    """Labels of forms `topk` and `hard`, read from the cache."""

    reader: reader.SparseReader
    target: Target
    scores: bool = False

    @property
    def classes(self) -> int:
        return self.reader.classes

    def open(self, units: Sequence[int], crops_m: np.ndarray) -> Window:
        def take(rows_I: np.ndarray) -> Values:
            kept = self.reader.take(rows_I, crops_m, self.target)
            return {"ids": kept.ids_BK, "prob": kept.prob_BK, "rest": kept.rest_B}

        return take

    def dense(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return spread(values["ids"], values["prob"], values["rest"], self.classes)


@dataclass(frozen=True)
class DenseLabels:
    """Labels of forms `full` and `logits`; a window holds the scores of its units in memory.

    Attributes:
        temperature: the label is softmax(scores / temperature).
    """

    reader: reader.WideReader
    target: Target
    classes: int
    temperature: float
    scores: bool

    def open(self, units: Sequence[int], crops_m: np.ndarray) -> Window:
        blocks = self.reader.units(units, crops_m)
        unit_size = self.reader.store.unit_size

        def take(rows_I: np.ndarray) -> Values:
            rows = [blocks[row // unit_size][row % unit_size] for row in rows_I.tolist()]
            return {"scores": np.concatenate(rows)}

        return take

    def dense(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return from_scores(values["scores"], self.temperature, self.target)


# Both have `classes` (C, the width), `scores` (True for scores of a self-supervised teacher, False
# for class probabilities), `open` (reads a window of some units and crops) and `dense` (a window's
# values, on any device, to float32 (B, C) probabilities whose rows sum to 1).
Labels = SparseLabels | DenseLabels


def one_hot(class_B: torch.Tensor, classes: int) -> torch.Tensor:
    """float32 (B, C) one-hot rows of int64 classes; zeros where the class is -1 (unknown)."""
    known_B1 = (class_B >= 0).to(torch.float32)[:, None]
    zeros = torch.zeros(len(class_B), classes, device=class_B.device)
    return zeros.scatter_(1, class_B.clamp_min(0)[:, None], known_B1)


def spread(
    ids_BK: torch.Tensor, prob_BK: torch.Tensor, rest_B: torch.Tensor, classes: int
) -> torch.Tensor:
    """float32 (B, C): kept probabilities at their classes, the rest spread evenly over the other
    C - K classes."""
    share_B = rest_B / max(classes - ids_BK.shape[1], 1)
    filled = share_B[:, None].expand(-1, classes).contiguous()
    return filled.scatter_(1, ids_BK, prob_BK)


def from_scores(scores_BC: torch.Tensor, temperature: float, target: Target) -> torch.Tensor:
    """float32 (B, C): any target from stored log-probabilities or logits."""
    prob_BC = torch.softmax(scores_BC.float() / temperature, dim=1)
    if target.kind == "full":
        return prob_BC
    if target.kind == "hard":
        return one_hot(prob_BC.argmax(1), prob_BC.shape[1])
    k = 1 if target.kind == "smoothing" else target.k
    top = prob_BC.topk(k, dim=1)
    total_B1 = top.values.sum(dim=1, keepdim=True)
    if target.kind == "marginal-renorm" or k == prob_BC.shape[1]:
        kept, rest_B = top.values / total_B1, torch.zeros_like(total_B1[:, 0])
    else:
        kept, rest_B = top.values, (1 - total_B1[:, 0]).clamp_min(0)
    return spread(top.indices, kept, rest_B, prob_BC.shape[1])


class Features:
    """Stored features. A window holds those of its units in memory, encoded as stored.

    Attributes:
        settings: of the features' part in the store.
    """

    def __init__(self, store: Store, segments: Sequence[reader.Segment]) -> None:
        part = segments[0].part
        self.settings: FeatureSettings = part.settings
        self._fields = {
            field.name: reader.WideReader(store, segments, field.name) for field in part.fields
        }
        self._unit_size = store.unit_size

    def example(self, device: torch.device) -> torch.Tensor:
        """float32 (1, D) zeros, shaped as the features of one crop."""
        return torch.zeros(1, self.settings.dims, device=device)

    def open(self, units: Sequence[int], crops_m: np.ndarray) -> Window:
        blocks = {
            unit: {name: wide.unit(unit, crops_m) for name, wide in self._fields.items()}
            for unit in units
        }
        size, code = self._unit_size, self.settings.code

        def take(rows_I: np.ndarray) -> Values:
            stored = {
                name: np.concatenate([blocks[r // size][name][r % size] for r in rows_I.tolist()])
                for name in self._fields
            }
            return {"features": codes.decode(code, stored)}

        return take

    def outputs(self, features: torch.Tensor) -> Outputs:
        """Stored features as the outputs of a teacher, without logits.

        In a network without a last activation, pre and penultimate are the same vector.

        Args:
            features: float32 (B, D), with D = C * H * W for maps.
        """
        both, layer = self.settings.pre_is_post, self.settings.layer
        no_logits = features.new_empty((len(features), 0))
        if layer == "map":
            return Outputs(logits=no_logits, final=features.unflatten(1, self.settings.shape))
        return Outputs(
            logits=no_logits,
            pre=features if both or layer == "pre" else None,
            penultimate=features if both or layer == "post" else None,
        )


def check_teacher(settings: FeatureSettings, facts: dict[str, Any]) -> None:
    """Refuse a live teacher other than the one of the stored features.

    Args:
        settings: of the features' part. facts: from `teachers.Teacher.facts`.

    Raises:
        StoreMismatchError: the teachers differ; the message says in what.
    """
    (stored_teacher,) = settings.teachers
    differs = teachers_differ(stored_teacher, facts)
    if differs:
        raise StoreMismatchError(
            f"the stored {settings.layer} features are from {stored_teacher['name']}, which "
            f"differs from the live teacher in {', '.join(differs)}. Name the teacher that "
            "generated them, or generate features with this one."
        )
