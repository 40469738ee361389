"""Labels and features as a store gives them to the feed: opened window by window.

Narrow labels are hydrated once, so a window is a choice of crops; wide ones and features are read
for the units of a window and held in memory while it lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fkdpipe.common.errors import StoreMismatchError
from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.networks.features import teachers_differ
from fkdpipe.networks.models import SELF_SUPERVISED
from fkdpipe.storage import features as codes
from fkdpipe.storage import labels as forms
from fkdpipe.storage import reader
from fkdpipe.storage.labels import SparseLabels, Target
from fkdpipe.storage.settings import FeatureSettings
from fkdpipe.storage.store import Store


@dataclass(frozen=True)
class Scores:
    """Stored scores of B crops, a temperature away from probabilities.

    Attributes:
        scores_BC: float16 log-probabilities or logits.
        temperature: softmax(scores / temperature) is the label.
    """

    scores_BC: np.ndarray
    temperature: float


LabelBatch = SparseLabels | Scores


class LabelWindow(Protocol):
    def take(self, rows_I: np.ndarray) -> LabelBatch:
        """Labels of the window's crops of some of its rows; B = I * m, image-major."""


class Labels(Protocol):
    """Labels of a store, opened window by window so that wide ones can be read ahead.

    classes: their width. scores: they are no classes but scores of a self-supervised teacher.
    """

    classes: int
    scores: bool

    def open_window(self, units: Sequence[int], crops_m: np.ndarray) -> LabelWindow: ...


class FeatureWindow(Protocol):
    def take(self, rows_I: np.ndarray) -> np.ndarray:
        """float32 (B, ...) of the window's crops of some of its rows; B = I * m, image-major."""


class Features(Protocol):
    """Features of a store, opened like labels. settings: of their part in the store."""

    settings: FeatureSettings

    def open_window(self, units: Sequence[int], crops_m: np.ndarray) -> FeatureWindow: ...

    def example(self, device: torch.device) -> torch.Tensor:
        """float32 (1, ...) zeros of the shape of one crop's features."""


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
    settings = segments[0].part.settings
    classes = settings.classes
    forms.check_target(form, target, classes)
    divisor = reader.check_temperature(segments, temperature)
    if form.sparse:
        return _SparseStore(reader.SparseReader(store, segments, cache_dir, advance), target)
    scores = any(teacher.get("library") in SELF_SUPERVISED for teacher in settings.teachers)
    wide = reader.WideReader(store, segments, form.value_field)
    return _ScoreStore(wide, classes, divisor, scores)


class _SparseStore:
    """Hydrated labels: a window is nothing but the choice of crops."""

    def __init__(self, labels: reader.SparseReader, target: Target) -> None:
        self.classes, self.scores = labels.classes, False
        self._labels, self._target = labels, target

    def open_window(self, units: Sequence[int], crops_m: np.ndarray) -> LabelWindow:
        return _SparseWindow(self._labels, self._target, crops_m)


@dataclass(frozen=True)
class _SparseWindow:
    labels: reader.SparseReader
    target: Target
    crops_m: np.ndarray

    def take(self, rows_I: np.ndarray) -> SparseLabels:
        return self.labels.take(rows_I, self.crops_m, self.target)


class _ScoreStore:
    """Streamed scores: a window holds those of its units in memory."""

    def __init__(
        self, wide: reader.WideReader, classes: int, temperature: float, scores: bool
    ) -> None:
        self.classes, self.scores = classes, scores
        self._wide, self._temperature = wide, temperature

    def open_window(self, units: Sequence[int], crops_m: np.ndarray) -> LabelWindow:
        blocks = self._wide.units(units, crops_m)
        return _ScoreWindow(blocks, self._wide.store.unit_size, self._temperature)


@dataclass(frozen=True)
class _ScoreWindow:
    blocks: dict[int, np.ndarray]
    unit_size: int
    temperature: float

    def take(self, rows_I: np.ndarray) -> Scores:
        rows = [self.blocks[r // self.unit_size][r % self.unit_size] for r in rows_I.tolist()]
        return Scores(np.concatenate(rows), self.temperature)


def stored_outputs(features: torch.Tensor, settings: FeatureSettings) -> Outputs:
    """Stored features as a teacher's outputs, as the method asked for them; no logits.

    Where a network ends without an activation, one vector is both before and after it.

    Args:
        features: float32 (B, D); of a map D = C * H * W.
    """
    both = settings.pre_is_post
    layer = settings.layer
    nothing = features.new_empty((len(features), 0))
    if layer == "map":
        return Outputs(logits=nothing, final=features.unflatten(1, settings.shape))
    return Outputs(
        logits=nothing,
        pre=features if both or layer == "pre" else None,
        penultimate=features if both or layer == "post" else None,
    )


def check_teacher(settings: FeatureSettings, facts: dict[str, Any]) -> None:
    """Refuse a live teacher that has not made the stored features.

    Args:
        settings: of the features' part. facts: of `fkdpipe.networks.teachers.Teacher.facts`.

    Raises:
        StoreMismatchError: naming what differs.
    """
    (made_by,) = settings.teachers
    differs = teachers_differ(made_by, facts)
    if differs:
        raise StoreMismatchError(
            f"the stored {settings.layer} is of {made_by['name']} with other "
            f"{', '.join(differs)} than the live teacher. Name the teacher that made it, or "
            "generate from this one."
        )


class FeatureStore:
    """Streamed features: a window holds those of its units in memory, as they are stored."""

    def __init__(self, store: Store, segments: Sequence[reader.Segment]) -> None:
        part = segments[0].part
        self.settings: FeatureSettings = part.settings
        self._fields = {
            field.name: reader.WideReader(store, segments, field.name) for field in part.fields
        }
        self._unit_size = store.unit_size

    def example(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(1, self.settings.dims, device=device)

    def open_window(self, units: Sequence[int], crops_m: np.ndarray) -> FeatureWindow:
        blocks = {
            unit: {name: wide.unit(unit, crops_m) for name, wide in self._fields.items()}
            for unit in units
        }
        return _FeatureRows(blocks, self._unit_size, self.settings.code)


@dataclass(frozen=True)
class _FeatureRows:
    blocks: dict[int, dict[str, np.ndarray]]
    unit_size: int
    code: codes.Code

    def take(self, rows_I: np.ndarray) -> np.ndarray:
        places = [(self.blocks[r // self.unit_size], r % self.unit_size) for r in rows_I.tolist()]
        names = places[0][0]
        return codes.decode(
            self.code,
            {
                name: np.concatenate([block[name][place] for block, place in places])
                for name in names
            },
        )
