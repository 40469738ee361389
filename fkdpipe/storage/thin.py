"""A subset of a store, without a teacher: fewer crops, a smaller K or a smaller form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fkdpipe.common import words
from fkdpipe.common.errors import StoreMismatchError, UsageError
from fkdpipe.common.progress import keeping
from fkdpipe.storage import begin, labels, reader, rounds, schema, writer
from fkdpipe.storage.labels import Form, Target
from fkdpipe.storage.location import Location
from fkdpipe.storage.reader import Segment
from fkdpipe.storage.settings import CropsSettings, LabelSettings, Settings
from fkdpipe.storage.store import IMAGES, Part, Store

Failed = dict[int, tuple[str, str]]


@dataclass(frozen=True)
class Subset:
    """What to keep of a store.

    Attributes:
        crops: how many crops of each image, the first ones; None keeps all.
        form: of the labels; None keeps the stored one.
        source: of the labels; None takes the only one.
        derived_boxes: store a checksum of the boxes instead of the boxes.
    """

    crops: int | None = None
    form: Form | None = None
    source: str | None = None
    derived_boxes: bool = False


def thin(
    store: Store,
    location: Location,
    subset: Subset,
    *,
    on_images: Callable[[int], None] = lambda count: None,
) -> Store:
    """Write a new store with one round and one source, unit by unit; a second call resumes.

    Args:
        location: of the new store.

    Raises:
        UsageError: more crops than the store has.
        StoreMismatchError: the stored form cannot be reduced to the requested one, or the location
            holds a store of other images or settings.
        UnsealedStoreError, DamagedStoreError: of the store that is read.
    """
    source = reader.choose_source(store, subset.source)
    finished = reader.finished(store, [("labels", source, "")])
    old: Part[LabelSettings] = finished.labels[0][0].part
    form, classes = old.settings.form, old.settings.classes
    new_form = subset.form or form
    _check(form, new_form, classes)
    most = finished.crops_per_image
    count = subset.crops or most
    if not 1 <= count <= most:
        raise UsageError(f"the store has {most} crops per image; found {count}.")
    crops_settings: CropsSettings = replace(
        finished.crops[0].part.settings, crops=count, derived=subset.derived_boxes
    )
    labels_settings = replace(old.settings, form=new_form, crops=count)
    if subset.derived_boxes:
        _ = crops_settings.distribution  # raises for imported boxes, which cannot be drawn
    path = f"rounds/0/labels/{source}"
    _check_location(store, location, {"rounds/0/crops": crops_settings, path: labels_settings})
    result = _create(store, location)
    crop_fields = [] if subset.derived_boxes else rounds.fields_of(crops_settings)
    crops_part = writer.add_part(result, "rounds/0/crops", crops_settings, crop_fields)
    labels_part = writer.add_part(
        result,
        path,
        labels_settings,
        schema.label_fields(new_form, classes),
        provenance={**old.provenance, "thinned_from": str(form)},
    )
    done = writer.committed_units(result, labels_part, range(store.num_units))
    source_labels = _Labels(store, finished.labels[0], new_form)
    with keeping(lambda: words.units_kept(len(done), store.num_units)):
        for unit in range(store.num_units):
            rows = store.unit_rows(unit)
            if unit not in done:
                here = range(rows.start, rows.stop)
                failed = {r: why for r, why in finished.failed.items() if r in here}
                recorded = reader.read_crops(store, finished.crops, unit, count)
                values = {} if subset.derived_boxes else rounds.values_of(recorded)
                facts = {"crops_crc32c": rounds.checksum(recorded)}
                without = _crops_failed(finished.crops, failed)
                writer.commit_unit(result, crops_part, unit, values, failed=without, facts=facts)
                kept = source_labels.unit(unit, count, failed)
                facts = finished.labels[0][0].manifest.facts.get(unit, {})
                writer.commit_unit(result, labels_part, unit, kept, failed=failed, facts=facts)
                done.add(unit)
            on_images(rows.stop - rows.start)
    for part in (result.part(IMAGES), crops_part, labels_part):
        writer.seal(result, part)
    return result


def _check_location(store: Store, location: Location, settings: dict[str, Settings]) -> None:
    """Refuse to overwrite another store, and to write a store that is no smaller.

    Args:
        settings: of the new store's parts, by path.

    Raises:
        UsageError: it is the store itself, or would hold all that the store holds.
        StoreMismatchError: the location holds another store.
    """
    if location.url == store.url:
        raise UsageError(f"{store.url} is the store itself; choose a new folder for the subset.")
    parts = {path: part.settings for path, part in store.parts.items() if path != IMAGES}
    if parts == settings:
        raise UsageError(
            f"the subset would hold everything in {store.url}. Choose what to reduce: --crops M, a "
            "smaller --form, or --derive-boxes."
        )
    existing = begin.find_store(location)  # raises if it is not a store
    if existing is None or existing.facts["fingerprint"] != store.facts["fingerprint"]:
        return  # create_store refuses a store of other images
    for path, part in existing.parts.items():
        if path != IMAGES and part.settings != settings.get(path):
            raise StoreMismatchError(
                f"{location.url} holds a store with another {path}. Choose a new folder, or use "
                "the options it was started with to resume it.",
                code="settings",
            )


def _check(form: Form, new: Form, classes: int) -> None:
    """Refuse a form that needs more than the stored one holds."""
    labels.check_form(new, classes)
    size = {"hard": 0, "topk": 1, "full": 2, "logits": 3}
    smaller = size[new.kind] <= size[form.kind]
    if new.kind == form.kind == "topk":
        smaller = new.k <= form.k and (new.compact or not form.compact)
    if not smaller:
        raise StoreMismatchError(
            f"labels of form {form} cannot be reduced to {new}. Forms can be reduced in the order "
            "logits, full, topk:K, topk:K:compact, hard, and to a smaller K.",
            code="form-too-poor",
        )


def _create(store: Store, location: Location) -> Store:
    """Create a store of the same images in the same order, or open the one that was started."""
    seed = int(store.facts["order_seed"])
    unit, group = store.unit_size, store.group_size
    return writer.create_store(location, _columns(store), seed=seed, unit=unit, group=group)


def _columns(store: Store) -> writer.ImageColumns:
    listed = store.images
    return writer.ImageColumns(
        keys=[str(key) for key in listed.keys],
        class_N=listed.class_N,
        size_N2=listed.size_N2,
        bytes_N=listed.bytes_N,
        class_names=listed.class_names,
        rejected=listed.rejected,
        fingerprint=str(store.facts["fingerprint"]),
    )


def _crops_failed(segments: Sequence[Segment], failed: Failed) -> Failed:
    """Of the failed images of a unit, those that an import had no crops for."""
    return {
        row: why for row, why in failed.items() if any(row in s.manifest.failed for s in segments)
    }


class _Labels:
    """Labels of a source, converted to another form unit by unit."""

    def __init__(self, store: Store, segments: Sequence[Segment], new: Form) -> None:
        self.store, self.segments, self.new = store, segments, new
        self.part: Part[LabelSettings] = segments[0].part
        self.old, self.classes = self.part.settings.form, self.part.settings.classes

    def unit(self, unit: int, count: int, failed: dict) -> dict[str, np.ndarray]:
        """Stored fields of the new form; rows of failed images hold fill values."""
        old = {
            field.name: reader.read_unit(
                self.store, self.segments, field.name, unit, np.arange(count)
            )
            for field in self.part.fields
        }
        rows = self.store.unit_rows(unit)
        good = np.ones(rows.stop - rows.start, dtype=bool)
        good[[row - rows.start for row in failed]] = False
        fields = schema.label_fields(self.new, self.classes)
        new = {f.name: writer.fill_rows(f, len(good), count) for f in fields}
        if good.any():
            flat = {n: v[good].reshape(-1, *v.shape[2:]) for n, v in old.items()}
            for name, values in self._convert(flat).items():
                new[name][good] = values.reshape(int(good.sum()), count, *values.shape[1:])
        return new

    def _convert(self, old: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.new == self.old:
            return old
        if not self.old.sparse:
            return self._from_scores(old)
        if self.new.kind == "hard":
            return {"ids": old["ids"][:, :1]}
        prob = labels.decode_probabilities(self.old, old[self.old.value_field])
        kept = labels.sparse_target(
            Target("marginal-smoothing", self.new.k), old["ids"], prob, self.classes
        )
        if self.new.k == self.classes:  # all classes are kept, and sparse_target would renormalise
            return self._sparse(old["ids"], prob)
        return self._sparse(kept.ids_BK, kept.prob_BK)

    def _from_scores(self, old: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        scores = old[self.old.value_field]
        if self.new.kind == "full":
            with np.errstate(divide="ignore"):
                kept = labels.encode_scores(np.log(labels.softmax(scores)))
                return {self.new.value_field: kept}
        prob = labels.softmax(scores)
        ids, kept = labels.top_k(prob, self.new.k)
        return self._sparse(ids, kept)

    def _sparse(self, ids: np.ndarray, prob: np.ndarray) -> dict[str, np.ndarray]:
        """Stored fields of ids and probabilities, top class first, the others in any order."""
        ids, prob = labels.hybrid_order(ids, prob)
        dtype = labels.id_dtype(self.classes)
        if self.new.kind == "hard":
            return {"ids": ids[:, :1].astype(dtype)}
        kept = labels.encode_probabilities(self.new, prob)
        return {"ids": ids.astype(dtype), self.new.value_field: kept}
