"""What a store gives of each crop beside its box: labels and features.

They are opened window by window, so that wide arrays can be read ahead. A window gives the values
of some of its images as numpy arrays, image-major: row = image * m + crop. They travel to the
device as they are, and labels become dense probabilities there (FKD equations 3 to 7).

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
Window = Callable[[np.ndarray], Values]  # int64 (I,) rows to arrays of B rows, by name


def open_labels(
    store: Store,
    segments: Sequence[reader.Segment],
    target: Target,
    temperature: float | None,
    cache_dir: Path,
    advance: Callable[[int], None],
) -> Labels:
    """Labels for a target at a temperature, None as stored.

    Raises:
        StoreMismatchError: the stored form does not serve the target, or this temperature.
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
    """Labels of forms `topk` and `hard`, from the cache: a window is a choice of crops."""

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
    """Labels of forms `full` and `logits`: a window holds the scores of its units in memory.

    temperature: softmax(scores / temperature) is the label.
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


# Both have `classes` (C, their width), `scores` (whether they are scores of a self-supervised
# teacher instead of classes), `open` (the window of some units and crops; reads what it will give)
# and `dense` (float32 (B, C) probabilities, rows sum to 1, of a window's values on any device).
Labels = SparseLabels | DenseLabels


def one_hot(class_B: torch.Tensor, classes: int) -> torch.Tensor:
    """float32 (B, C) of int64 classes; a row of zeros where the class is -1 (unknown)."""
    known_B1 = (class_B >= 0).to(torch.float32)[:, None]
    zeros = torch.zeros(len(class_B), classes, device=class_B.device)
    return zeros.scatter_(1, class_B.clamp_min(0)[:, None], known_B1)


def spread(
    ids_BK: torch.Tensor, prob_BK: torch.Tensor, rest_B: torch.Tensor, classes: int
) -> torch.Tensor:
    """float32 (B, C): kept probabilities at their classes, the rest shared evenly by the C - K
    others."""
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
    """Features of a store. A window holds those of its units in memory, as they are stored.

    settings: of their part in the store.
    """

    def __init__(self, store: Store, segments: Sequence[reader.Segment]) -> None:
        part = segments[0].part
        self.settings: FeatureSettings = part.settings
        self._fields = {
            field.name: reader.WideReader(store, segments, field.name) for field in part.fields
        }
        self._unit_size = store.unit_size

    def example(self, device: torch.device) -> torch.Tensor:
        """float32 (1, D) zeros of the shape of one crop's features."""
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
        """Stored features as a teacher's outputs, as the method asked for them; no logits.

        Where a network ends without an activation, one vector is both before and after it.

        Args:
            features: float32 (B, D); of a map D = C * H * W.
        """
        both, layer = self.settings.pre_is_post, self.settings.layer
        nothing = features.new_empty((len(features), 0))
        if layer == "map":
            return Outputs(logits=nothing, final=features.unflatten(1, self.settings.shape))
        return Outputs(
            logits=nothing,
            pre=features if both or layer == "pre" else None,
            penultimate=features if both or layer == "post" else None,
        )


def check_teacher(settings: FeatureSettings, facts: dict[str, Any]) -> None:
    """Refuse a live teacher that has not made the stored features.

    Args:
        settings: of the features' part. facts: of `teachers.Teacher.facts`.

    Raises:
        StoreMismatchError: naming what differs.
    """
    (made_by,) = settings.teachers
    differs = teachers_differ(made_by, facts)
    if differs:
        raise StoreMismatchError(
            f"the stored {settings.layer} features are of {made_by['name']} with other "
            f"{', '.join(differs)} than the live teacher. Name the teacher that made them, or "
            "generate from this one."
        )
