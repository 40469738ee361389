"""A store opened by hand: what is in it, and its values as NumPy arrays.

    store = open_store("store")
    store                                                  # in a notebook: a short table
    store.read("resnet50", "ids", rows=[0, 1], crops=[0])  # as stored
    store.probabilities("resnet50", rows=slice(0, 100))    # float32, all classes

Rows are images in the store's order, a fixed random permutation. Letters: I images asked for, m
crops of each, C classes, D feature dimensions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from html import escape

import numpy as np

from fkdpipe.common import words
from fkdpipe.common.errors import StoreError, UnsealedStoreError, UsageError
from fkdpipe.inspect import report
from fkdpipe.inspect.report import SourceReport, StorageReport
from fkdpipe.storage import features as codes
from fkdpipe.storage import labels, reader, rounds
from fkdpipe.storage import store as storage
from fkdpipe.storage.reader import Segment
from fkdpipe.storage.schema import Field
from fkdpipe.storage.settings import CropsSettings, FeatureSettings, LabelSettings

Index = Sequence[int] | np.ndarray | slice | int | None


class Store:
    """An opened store. Cheap to make: lists and values are read when they are asked for.

    Unfinished stores open too; reading a unit that is not committed raises UnsealedStoreError.
    """

    def __init__(self, store: storage.Store) -> None:
        self._store = store

    @property
    def url(self) -> str:
        """Where it lies: the folder or the URL."""
        return self._store.url

    def __fspath__(self) -> str:
        """So that it can be given wherever a path or URL of a store is asked for."""
        return self.url

    @property
    def images(self) -> int:
        """N, images of the store's list."""
        return self._store.num_images

    @cached_property
    def crops_per_image(self) -> int:
        """M, crops recorded of every image, over all rounds."""
        return sum(part.settings.crops for part in self._store.rounds())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the folder's classes in order of class index; empty without class folders."""
        return self._store.images.class_names

    @property
    def class_indices(self) -> np.ndarray:
        """int32 (N,): the class of each image by its folder; -1 where it has none."""
        return self._store.images.class_N

    @cached_property
    def sources(self) -> tuple[SourceReport, ...]:
        """What teachers left: labels by source ("resnet50"), features by source and layer
        ("resnet50/post")."""
        return tuple(report.sources(self._store))

    @property
    def forms(self) -> dict[str, str]:
        """Form of each source of labels: {"resnet50": "topk:10"}."""
        return {source.name: source.form for source in self.sources if source.kind == "labels"}

    def keys(self, rows: Index = None) -> list[str]:
        """Paths of images, relative to the folder the store was made of."""
        return [str(key) for key in self._store.images.keys[self._rows(rows)]]

    def read(
        self, source: str | None, field: str, rows: Index = None, crops: Index = None
    ) -> np.ndarray:
        """Values of some crops as they are stored, checked against their checksums.

        Images that failed have fill values (`report().failed` counts them).

        Args:
            source: a name of `sources`. Fields of crops are the same for all: None will do.
            field: an array by its name on disk (docs/format.md): of crops "box", "flip" and
                "jitter"; of labels "ids", "prob" or "stick", "log_prob", "logit", "logit_max"; of
                features "value", or "code" and "scale".
            rows, crops: which; None takes all.

        Returns:
            (I, m, ...): box uint16 (top, left, height, width) in pixels; flip bool; jitter float32
            (brightness, contrast, saturation, hue); ids uint16 or uint32; the others as the form
            or the code has them.

        Raises:
            StoreError: no such source or field. UsageError: rows or crops that are not there.
            UnsealedStoreError: not committed yet. DamagedStoreError: not what was committed.
        """
        labelled, boxes = self._segments(source)
        found = {f.name: (boxes, f) for f in _crop_fields(boxes[0].part)}
        found |= {f.name: (labelled, f) for segment in labelled[:1] for f in segment.part.fields}
        if field not in found:
            raise StoreError(
                f"{self.url} has no field {field!r} of {source or 'its crops'}; it has "
                f"{', '.join(found)}.",
                code="no-field",
            )
        segments, kind = found[field]
        rows_I, crops_m = self._rows(rows), self._crops(crops, boxes)
        values = np.empty((len(rows_I), len(crops_m), *kind.shape), dtype=kind.dtype)
        unit_I, local_I = np.divmod(rows_I, self._store.unit_size)
        for unit in np.unique(unit_I).tolist() if len(crops_m) else ():
            if any(unit not in segment.manifest.facts for segment in segments):
                of_unit = self._store.unit_rows(unit)
                raise UnsealedStoreError(
                    f"{self.url}: unit {unit} of {source or 'its crops'} (rows {of_unit.start} to "
                    f"{of_unit.stop - 1}) is not finished.",
                    code="unsealed",
                )
            here = unit_I == unit
            values[here] = _unit(self._store, segments, field, unit, crops_m)[local_I[here]]
        return values

    def probabilities(
        self, source: str, rows: Index = None, crops: Index = None, *, temperature: float = 1.0
    ) -> np.ndarray:
        """float32 (I, m, C) labels of some crops; each row sums to 1.

        What `topk` leaves out is spread evenly over the other classes (marginal smoothing); `hard`
        gives one-hot rows. Images that failed have NaN.

        Args:
            temperature: of the softmax, for form `logits` alone.

        Raises:
            StoreError: no labels of this source; and those of `read`.
        """
        segments, _ = self._segments(source)
        settings = segments[0].part.settings if segments else None
        if not isinstance(settings, LabelSettings):
            raise StoreError(f"{self.url}: {source} holds no labels.", code="no-source")
        form, C = settings.form, settings.classes
        if not form.sparse:
            scores = self.read(source, form.value_field, rows, crops)
            factor = temperature if form.kind == "logits" else 1.0
            return labels.softmax(scores.reshape(-1, C), factor).reshape(scores.shape)
        ids = self.read(source, "ids", rows, crops)
        flat = ids.reshape(-1, form.k).astype(np.int64)
        failed = (flat >= C).any(axis=1)  # fill values
        flat[failed] = np.arange(form.k)
        prob = np.ones(flat.shape, dtype=np.float32)
        target = labels.Target("hard")
        if form.kind == "topk":
            stored = self.read(source, form.value_field, rows, crops).reshape(flat.shape)
            prob = labels.decode_probabilities(form, stored)
            target = labels.Target("marginal-smoothing", form.k)
        dense = labels.to_dense(labels.sparse_target(target, flat, prob, C), C)
        dense[failed] = np.nan
        return dense.reshape(*ids.shape[:2], C)

    def features(self, source: str, rows: Index = None, crops: Index = None) -> np.ndarray:
        """float32 (I, m, D) feature vectors of some crops; of maps (I, m, C, H, W).

        Images that failed have NaN.

        Args:
            source: "SOURCE/LAYER", for example "resnet50/post".

        Raises:
            StoreError: no features of this name; and those of `read`.
        """
        segments, _ = self._segments(source)
        settings = segments[0].part.settings if segments else None
        if not isinstance(settings, FeatureSettings):
            raise StoreError(f"{self.url}: {source} holds no features.", code="no-source")
        names = [field.name for field in segments[0].part.fields]
        stored = {name: self.read(source, name, rows, crops) for name in names}
        vectors = codes.decode(settings.code, stored)
        return vectors.reshape(*vectors.shape[:2], *(settings.shape or (settings.dims,)))

    def report(self) -> StorageReport:
        """What it takes on disk, field by field (`fkdpipe report`)."""
        return report.measure(self._store)

    def _segments(self, source: str | None) -> tuple[Sequence[Segment], Sequence[Segment]]:
        """(of the source, of the crops)."""
        wanted = []
        if source is not None:
            found = next((each for each in self.sources if each.name == source), None)
            if found is None:
                names = ", ".join(each.name for each in self.sources) or "none"
                raise StoreError(
                    f"{self.url} has no source {source!r}; it has {names}.", code="no-source"
                )
            name, _, layer = source.partition("/")
            wanted = [(found.kind, name, layer)]
        finished = reader.finished(self._store, wanted, allow_partial=True)
        return (finished.labels[0] if wanted else ()), finished.crops

    def _rows(self, rows: Index) -> np.ndarray:
        return _indices(rows, self.images, f"rows: {self.url} has {self.images} images")

    def _crops(self, crops: Index, boxes: Sequence[Segment]) -> np.ndarray:
        count = sum(segment.count for segment in boxes)
        return _indices(crops, count, f"crops: {self.url} has {count} of each image")

    def _table(self) -> list[tuple[str, str, str]]:
        """The list of images and each source, in words."""
        images = words.count(self.images, "image"), words.count(self.crops_per_image, "crop")
        return [(self.url, f"{images[0]} x {images[1]}", f"{len(self.classes):,} classes")] + [
            (each.name, each.form or each.kind, f"{each.units_done} of {each.units} units done")
            for each in self.sources
        ]

    def __repr__(self) -> str:
        return "\n  ".join(", ".join(row) for row in self._table())

    def _repr_html_(self) -> str:
        rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self._table()]
        return f"<table><tr>{'</tr><tr>'.join(rows)}</tr></table>"


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open a store for reading.

    Args:
        url: a folder, or a URL (`s3://`, `gs://`, `az://`, `memory://`).

    Raises:
        StoreError: no store there, or of another format version.
    """
    return Store(storage.open_store(url))


def _crop_fields(part: storage.Part[CropsSettings]) -> Sequence[Field]:
    return part.fields or rounds.fields_of(part.settings)


def _unit(
    store: storage.Store, segments: Sequence[Segment], field: str, unit: int, crops_m: np.ndarray
) -> np.ndarray:
    """(images of the unit, m, ...): stored, or of derived crops drawn again."""
    settings = segments[0].part.settings
    if isinstance(settings, CropsSettings) and settings.derived:
        drawn = reader.read_crops(store, segments, unit, int(crops_m.max()) + 1)
        return rounds.values_of(drawn)[field][:, crops_m]
    return reader.read_unit(store, segments, field, unit, crops_m)


def _indices(wanted: Index, count: int, what: str) -> np.ndarray:
    """int64, from anything that indexes an array.

    Raises:
        UsageError: an index that is not there.
    """
    try:
        return np.atleast_1d(np.arange(count)[slice(None) if wanted is None else wanted])
    except (IndexError, TypeError) as error:
        raise UsageError(f"{what}; {error}.") from None
