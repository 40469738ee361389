"""An opened store: its contents, and its values as NumPy arrays.

    store = open_store("store")
    store                                                  # in a notebook: a summary
    store.read("resnet50", "ids", rows=[0, 1], crops=[0])  # as stored
    store.probabilities("resnet50", rows=slice(0, 100))    # float32, all classes

Rows are images in the store's order, a fixed random permutation. Letters: I selected images, m
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
    """An opened store. Lists and values are read on demand.

    Unfinished stores can be opened; reading a unit that is not committed raises UnsealedStoreError.
    """

    def __init__(self, store: storage.Store) -> None:
        self._store = store

    @property
    def url(self) -> str:
        """The folder or URL of the store."""
        return self._store.url

    def __fspath__(self) -> str:
        """Lets a store be passed wherever a path or URL is expected."""
        return self.url

    @property
    def images(self) -> int:
        """N, the number of images in the store."""
        return self._store.num_images

    @cached_property
    def crops_per_image(self) -> int:
        """M, the number of crops recorded per image, over all rounds."""
        return sum(part.settings.crops for part in self._store.rounds())

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in order of class index; empty without class folders."""
        return self._store.images.class_names

    @property
    def class_indices(self) -> np.ndarray:
        """int32 (N,): class index of each image, from its folder; -1 without class."""
        return self._store.images.class_N

    @cached_property
    def sources(self) -> tuple[SourceReport, ...]:
        """Labels, named by source ("resnet50"), and features, by source and layer
        ("resnet50/post")."""
        return tuple(report.sources(self._store))

    @property
    def forms(self) -> dict[str, str]:
        """Form of each label source, for example {"resnet50": "topk:10"}."""
        return {source.name: source.form for source in self.sources if source.kind == "labels"}

    def keys(self, rows: Index = None) -> list[str]:
        """Paths of images, relative to the folder that the store was made from."""
        return [str(key) for key in self._store.images.keys[self._rows(rows)]]

    def read(
        self, source: str | None, field: str, rows: Index = None, crops: Index = None
    ) -> np.ndarray:
        """Stored values of some crops, verified against their checksums.

        Failed images have fill values (`report().failed` counts them).

        Args:
            source: a name from `sources`. Crop fields do not depend on it: None is enough.
            field: name of an array on disk (docs/format.md): for crops "box", "flip" and
                "jitter"; for labels "ids", "prob" or "stick", "log_prob", "logit", "logit_max"; for
                features "value", or "code" and "scale".
            rows, crops: indices; None selects all.

        Returns:
            (I, m, ...): box uint16 (top, left, height, width) in pixels; flip bool; jitter float32
            (brightness, contrast, saturation, hue); ids uint16 or uint32; the dtype of the others
            depends on the form or the code.

        Raises:
            StoreError: no such source or field. UsageError: rows or crops out of range.
            UnsealedStoreError: not committed yet. DamagedStoreError: a checksum differs.
        """
        labelled, boxes = self._segments(source)
        fields = {f.name: (boxes, f) for f in _crop_fields(boxes[0].part)}
        fields |= {f.name: (labelled, f) for segment in labelled[:1] for f in segment.part.fields}
        if field not in fields:
            raise StoreError(
                f"{self.url} has no field {field!r} of {source or 'its crops'}; it has "
                f"{', '.join(fields)}.",
                code="no-field",
            )
        segments, kind = fields[field]
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

        For `topk`, the remaining probability is spread evenly over the other classes (marginal
        smoothing); `hard` gives one-hot rows. Failed images are NaN.

        Args:
            temperature: of the softmax, only for form `logits`.

        Raises:
            StoreError: no labels from this source. Also all errors of `read`.
        """
        segments, _ = self._segments(source)
        settings = segments[0].part.settings if segments else None
        if not isinstance(settings, LabelSettings):
            raise StoreError(f"{self.url}: {source} has no labels.", code="no-source")
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
        """float32 (I, m, D) feature vectors of some crops, or maps (I, m, C, H, W).

        Failed images are NaN.

        Args:
            source: "SOURCE/LAYER", for example "resnet50/post".

        Raises:
            StoreError: no features of this name. Also all errors of `read`.
        """
        segments, _ = self._segments(source)
        settings = segments[0].part.settings if segments else None
        if not isinstance(settings, FeatureSettings):
            raise StoreError(f"{self.url}: {source} has no features.", code="no-source")
        names = [field.name for field in segments[0].part.fields]
        stored = {name: self.read(source, name, rows, crops) for name in names}
        vectors = codes.decode(settings.code, stored)
        return vectors.reshape(*vectors.shape[:2], *(settings.shape or (settings.dims,)))

    def report(self) -> StorageReport:
        """Size on disk by field (`fkdpipe report`)."""
        return report.measure(self._store)

    def _segments(self, source: str | None) -> tuple[Sequence[Segment], Sequence[Segment]]:
        """Segments of the source, and of the crops."""
        parts = []
        if source is not None:
            match = next((each for each in self.sources if each.name == source), None)
            if match is None:
                names = ", ".join(each.name for each in self.sources) or "none"
                raise StoreError(
                    f"{self.url} has no source {source!r}; it has {names}.", code="no-source"
                )
            name, _, layer = source.partition("/")
            parts = [(match.kind, name, layer)]
        finished = reader.finished(self._store, parts, allow_partial=True)
        return (finished.labels[0] if parts else ()), finished.crops

    def _rows(self, rows: Index) -> np.ndarray:
        return _indices(rows, self.images, f"rows: {self.url} has {self.images} images")

    def _crops(self, crops: Index, boxes: Sequence[Segment]) -> np.ndarray:
        count = sum(segment.count for segment in boxes)
        return _indices(crops, count, f"crops: {self.url} has {count} of each image")

    def _table(self) -> list[tuple[str, str, str]]:
        """Rows of the summary: the store, then each source."""
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
        StoreError: not a store, or an unsupported format version.
    """
    return Store(storage.open_store(url))


def _crop_fields(part: storage.Part[CropsSettings]) -> Sequence[Field]:
    return part.fields or rounds.fields_of(part.settings)


def _unit(
    store: storage.Store, segments: Sequence[Segment], field: str, unit: int, crops_m: np.ndarray
) -> np.ndarray:
    """(images of the unit, m, ...): stored values, or derived crops sampled again."""
    settings = segments[0].part.settings
    if isinstance(settings, CropsSettings) and settings.derived:
        crops = reader.read_crops(store, segments, unit, int(crops_m.max()) + 1)
        return rounds.values_of(crops)[field][:, crops_m]
    return reader.read_unit(store, segments, field, unit, crops_m)


def _indices(index: Index, count: int, what: str) -> np.ndarray:
    """int64 indices, from anything that can index an array.

    Raises:
        UsageError: an index out of range.
    """
    try:
        return np.atleast_1d(np.arange(count)[slice(None) if index is None else index])
    except (IndexError, TypeError) as error:
        raise UsageError(f"{what}; {error}.") from None
