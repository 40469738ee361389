"""A store -> label files of another system: read unit by unit, most probable class first.

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
    """Which labels; by default the only ones."""
    keep: PositiveInt | None = None
    """K, classes of each label; by default all that are stored. Needed where the store keeps every
    class."""


@dataclass(frozen=True)
class Exported:
    """What an export did. notes: what the format cannot hold, and what was left out."""

    images: int
    files: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Labelled:
    """The labelled images of a unit.

    Attributes:
        rows: int64 (I,), places in the store. keys: of the images. size_I2: (height, width).
        box_IM4: uint16. flip_IM: bool.
        ids_IMK: int64, most probable first. prob_IMK: float32; all one for form `hard`.
        jitter_IM4: float32 colour factors (`fkdpipe.pixels.crops.Crops`), None without any.
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
        settings: of the labels part.

    Raises:
        UsageError: K is more than the store keeps, or must be given.
        UnsealedStoreError, StoreError: the store is not complete, or has no such source.
    """

    def __init__(self, store: Store, wanted: ExportSettings) -> None:
        self.store = store
        self.source = reader.choose_source(store, wanted.source)
        self.found: Finished = reader.finished(store, [("labels", self.source, "")])
        self.segments = self.found.labels[0]
        self.settings: LabelSettings = self.segments[0].part.settings
        self.form, self.classes = self.settings.form, self.settings.classes
        self.crops = self.found.crops_per_image
        if not self.form.sparse and wanted.keep is None:
            raise UsageError(f"the store keeps all {self.classes} classes: say --keep K.")
        most = self.form.k if self.form.sparse else self.classes
        self.keep = most if wanted.keep is None else wanted.keep
        if self.keep > most:
            raise UsageError(f"--keep {self.keep}: the store keeps {most} classes of each label.")

    @cached_property
    def seeds(self) -> bool:
        """Are the crops those of recorded seeds?"""
        return all(SEED_FIELD in segment.part.fields for segment in self.found.crops)

    def notes(self) -> list[str]:
        """What every export has to say."""
        said = []
        failed = self.found.failed
        if failed:
            keys = [str(self.store.images.keys[row]) for row in sorted(failed)[:3]]
            said.append(f"{len(failed):,} images have no labels: {', '.join(keys)}, ...")
        if self.form.sparse and self.keep < self.form.k:
            said.append(f"{self.keep} of the {self.form.k} stored classes are written")
        return said

    def units(self, advance: Advance = lambda count: None) -> Iterator[Labelled]:
        """Unit after unit; one is in memory at a time."""
        images = self.store.images
        for unit in range(self.store.num_units):
            whole = self.store.unit_rows(unit)
            begin, end = np.searchsorted(self.found.rows, [whole.start, whole.stop])
            rows = self.found.rows[begin:end]
            local = rows - whole.start
            if len(rows):
                drawn = reader.read_crops(self.store, self.found.crops, unit, self.crops)[local]
                ids, prob = self._labels(unit, local)
                yield Labelled(
                    unit=unit,
                    rows=rows,
                    keys=[str(key) for key in images.keys[rows]],
                    size_I2=images.size_N2[rows],
                    box_IM4=drawn.box_NM4,
                    flip_IM=drawn.flip_NM,
                    ids_IMK=ids,
                    prob_IMK=prob,
                    jitter_IM4=drawn.jitter_NM4,
                )
            advance(whole.stop - whole.start)

    def seeds_of(self, labelled: Labelled) -> np.ndarray:
        """int32 (I, M): the seeds that the crops came from."""
        local = labelled.rows - self.store.unit_rows(labelled.unit).start
        return self._narrow(self.found.crops, SEED_FIELD.name, labelled.unit)[local]

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
        rank[:, 0] = np.inf  # the teacher's first choice, even where rounding made it tie
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
    """Refuse labels of crops whose colours were changed, where a format has no place for that.

    Raises:
        LabelsError: the other system would show its student other pixels.
    """
    if any(segment.part.settings.jitter is not None for segment in export.found.crops):
        raise LabelsError(
            f"{export.store.url}: its crops have recorded colour jitter, which {name}'s files "
            "cannot keep: its trainer would show other pixels than these labels belong to. Parquet "
            "keeps it.",
            code="transformed",
        )


def empty_folder(out: Path) -> Path:
    """A new folder for label files.

    Raises:
        LabelsError: something is there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LabelsError(f"{out} is not empty. Name a new folder.", code="not-empty")
    out.mkdir(parents=True, exist_ok=True)
    return out


def save_torch(value: Any, path: str | os.PathLike[str]) -> None:
    """torch.save; a failed write is an OSError that names the file.

    Raises:
        OSError: the disk refused.
    """
    import torch

    with disk.writing(path), open(path, "wb") as file:
        torch.save(value, file)
