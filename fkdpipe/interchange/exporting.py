"""Read a store for export to another system: unit by unit, most probable class first.

Letters: I images of a unit that have labels, M crops of each over all rounds, K kept classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt

from fkdpipe.common import config, disk
from fkdpipe.common.errors import LabelsError, UsageError
from fkdpipe.common.progress import Advance
from fkdpipe.interchange.source import SEED_FIELD
from fkdpipe.storage import labels, reader
from fkdpipe.storage.reader import Finished, Segment, WideReader
from fkdpipe.storage.settings import LabelSettings
from fkdpipe.storage.store import Store


@config.settings
class ExportSettings:
    """What to write."""

    source: str | None = None
    """Source of the labels; by default, the only one."""
    keep: PositiveInt | None = None
    """K, classes of each label; by default, all that are stored. Required if the store holds every
    class."""


@dataclass(frozen=True)
class Exported:
    """The result of an export. notes: what the format cannot hold, and what was left out."""

    images: int
    files: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Labelled:
    """The labelled images of a unit.

    Attributes:
        rows: int64 (I,), rows of the store. keys: of the images. size_I2: (height, width).
        box_IM4: uint16. flip_IM: bool.
        ids_IMK: int64, most probable first. prob_IMK: float32; all one for form `hard`.
        jitter_IM4: float32 colour factors (`fkdpipe.pixels.crops.Crops`), or None.
    """

    unit: int
    rows: np.ndarray
    keys: Sequence[str]
    size_I2: np.ndarray
    box_IM4: np.ndarray
    flip_IM: np.ndarray
    ids_IMK: np.ndarray
    prob_IMK: np.ndarray
    jitter_IM4: np.ndarray | None = None


class Export:
    """A store's labels of one source, opened for an export.

    Attributes:
        form: as stored. classes: C. keep: K that is written. crops: M.
        finished: the crops and images that are exported. settings: of the labels part.

    Raises:
        UsageError: K exceeds the number of stored classes, or is required but missing.
        UnsealedStoreError, StoreError: the store is not complete, or has no such source.
    """

    def __init__(self, store: Store, options: ExportSettings) -> None:
        self.store = store
        self.source = reader.choose_source(store, options.source)
        self.finished: Finished = reader.finished(store, [("labels", self.source, "")])
        self.segments = self.finished.labels[0]
        self.settings: LabelSettings = self.segments[0].part.settings
        self.form, self.classes = self.settings.form, self.settings.classes
        self.crops = self.finished.crops_per_image
        if not self.form.sparse and options.keep is None:
            raise UsageError(f"the store holds all {self.classes} classes: choose some, --keep K.")
        most = self.form.k if self.form.sparse else self.classes
        self.keep = most if options.keep is None else options.keep
        if self.keep > most:
            raise UsageError(f"--keep {self.keep}: the store holds {most} classes of each label.")

    @cached_property
    def seeds(self) -> bool:
        """Does the store hold the seeds that the crops came from?"""
        return all(SEED_FIELD in segment.part.fields for segment in self.finished.crops)

    def notes(self) -> list[str]:
        """Notes that apply to every format."""
        notes = []
        failed = self.finished.failed
        if failed:
            keys = [str(self.store.images.keys[row]) for row in sorted(failed)[:3]]
            notes.append(f"{len(failed):,} images have no labels: {', '.join(keys)}, ...")
        if self.form.sparse and self.keep < self.form.k:
            notes.append(f"{self.keep} of the {self.form.k} stored classes are written")
        return notes

    def units(self, advance: Advance = lambda count: None) -> Iterator[Labelled]:
        """The units in order; one is in memory at a time."""
        images = self.store.images
        for unit in range(self.store.num_units):
            whole = self.store.unit_rows(unit)
            begin, end = np.searchsorted(self.finished.rows, [whole.start, whole.stop])
            rows = self.finished.rows[begin:end]
            local = rows - whole.start
            if len(rows):
                crops = reader.read_crops(self.store, self.finished.crops, unit, self.crops)[local]
                ids, prob = self._labels(unit, local)
                yield Labelled(
                    unit=unit,
                    rows=rows,
                    keys=[str(key) for key in images.keys[rows]],
                    size_I2=images.size_N2[rows],
                    box_IM4=crops.box_NM4,
                    flip_IM=crops.flip_NM,
                    ids_IMK=ids,
                    prob_IMK=prob,
                    jitter_IM4=crops.jitter_NM4,
                )
            advance(whole.stop - whole.start)

    def seeds_of(self, labelled: Labelled) -> np.ndarray:
        """int32 (I, M): the seeds that the crops came from."""
        local = labelled.rows - self.store.unit_rows(labelled.unit).start
        return self._narrow(self.finished.crops, SEED_FIELD.name, labelled.unit)[local]

    def _labels(self, unit: int, local: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids_IMK, prob_IMK), most probable first."""
        if self.form.sparse:
            return self._sparse(unit, local)
        parts = zip(*self._scored(unit, local), strict=True)
        ids, prob = (np.concatenate(values, axis=1) for values in parts)
        return ids, prob

    def _sparse(self, unit: int, local: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = self._narrow(self.segments, "ids", unit)[local]
        shape = (*ids.shape[:2], self.keep)
        ids = ids.reshape(-1, self.form.k).astype(np.int64)
        if self.form.kind == "hard":
            return ids.reshape(shape), np.ones(shape, dtype=np.float32)
        stored = self._narrow(self.segments, self.form.value_field, unit)[local]
        prob = labels.decode_probabilities(self.form, stored.reshape(-1, self.form.k))
        rank = prob.copy()
        rank[:, 0] = np.inf  # the teacher's top class, even if rounding made a tie
        order = np.argsort(-rank, axis=1, kind="stable")[:, : self.keep]
        ids, prob = (np.take_along_axis(values, order, 1) for values in (ids, prob))
        return ids.reshape(shape), prob.reshape(shape)

    def _scored(self, unit: int, local: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """From all scores, a crop group at a time."""
        logits = self.form.kind == "logits"
        temperature = (self.settings.temperature or 1.0) if logits else 1.0
        wide = WideReader(self.store, self.segments, self.form.value_field)
        for first in range(0, self.crops, self.store.group_size):
            crops_m = np.arange(first, min(first + self.store.group_size, self.crops))
            scores = wide.unit(unit, crops_m)[local]
            shape = (len(local), len(crops_m), self.keep)
            prob = labels.softmax(scores.reshape(-1, self.classes), temperature)
            ids, kept = labels.top_k(prob, self.keep)
            yield ids.reshape(shape), kept.reshape(shape)

    def _narrow(self, segments: Sequence[Segment], name: str, unit: int) -> np.ndarray:
        """(images of the unit, M, ...) of a narrow field."""
        return reader.read_unit(self.store, segments, name, unit, np.arange(self.crops))


def refuse_jitter(export: Export, name: str) -> None:
    """Refuse crops with recorded colour jitter, for formats that cannot hold it.

    Raises:
        LabelsError: the other system would train on other pixels.
    """
    if any(segment.part.settings.jitter is not None for segment in export.finished.crops):
        raise LabelsError(
            f"{export.store.url}: its crops have recorded colour jitter, which {name}'s files "
            "cannot hold: its trainer would show other pixels than these labels belong to. Parquet "
            "keeps it.",
            code="transformed",
        )


def empty_folder(out: Path) -> Path:
    """Create a folder for label files.

    Raises:
        LabelsError: it is not empty. UsageError: it is a URL.
    """
    disk.local_path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LabelsError(f"{out} is not empty. Choose a new folder.", code="not-empty")
    out.mkdir(parents=True, exist_ok=True)
    return out


def save_torch(value: Any, path: str | os.PathLike[str]) -> None:
    """torch.save whose errors name the file.

    Raises:
        OSError: the file cannot be written.
    """
    import torch

    with disk.writing(path), open(path, "wb") as file:
        torch.save(value, file)
