"""A smaller store from a larger one, without a teacher: fewer crops, smaller K, a poorer form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fkdpipe.common.errors import StoreMismatchError, UsageError
from fkdpipe.storage import begin, labels, reader, rounds, schema, writer
from fkdpipe.storage.labels import Form, Target
from fkdpipe.storage.location import Location
from fkdpipe.storage.reader import Segment
from fkdpipe.storage.settings import CropsSettings, LabelSettings, Settings
from fkdpipe.storage.store import IMAGES, Part, Store

Failed = dict[int, tuple[str, str]]


@dataclass(frozen=True)
class Thinning:
    """What to keep.

    Attributes:
        crops: the first so many of each image; None keeps all.
        form: of the labels; None keeps theirs.
        source: which labels; None takes the only ones.
        derived_boxes: keep a checksum of the boxes instead of the boxes.
    """

    crops: int | None = None
    form: Form | None = None
    source: str | None = None
    derived_boxes: bool = False


def thin(
    store: Store,
    location: Location,
    wanted: Thinning,
    *,
    on_images: Callable[[int], None] = lambda count: None,
) -> Store:
    """Write a new store with one round and one source, unit by unit; started again, it goes on.

    Args:
        location: of the new store.

    Raises:
        UsageError: more crops than there are.
        StoreMismatchError: the stored form cannot become the one asked for, or the place holds a
            store of other images or settings.
        UnsealedStoreError, DamagedStoreError: of the store that is read.
    """
    source = reader.choose_source(store, wanted.source)
    found = reader.finished(store, [("labels", source, "")])
    old: Part[LabelSettings] = found.labels[0][0].part
    form, classes = old.settings.form, old.settings.classes
    new_form = wanted.form or form
    _check(form, new_form, classes)
    count = wanted.crops or found.crops_per_image
    if not 1 <= count <= found.crops_per_image:
        raise UsageError(f"the store has {found.crops_per_image} crops per image; found {count}.")
    crops_settings: CropsSettings = replace(
        found.crops[0].part.settings, crops=count, derived=wanted.derived_boxes
    )
    labels_settings = replace(old.settings, form=new_form, crops=count)
    if wanted.derived_boxes:
        _ = crops_settings.distribution  # boxes of an import cannot be drawn again
    path = f"rounds/0/labels/{source}"
    _check_place(store, location, {"rounds/0/crops": crops_settings, path: labels_settings})
    made = _create(store, location)
    crop_fields = [] if wanted.derived_boxes else rounds.fields_of(crops_settings)
    crops_part = writer.add_part(made, "rounds/0/crops", crops_settings, crop_fields)
    labels_part = writer.add_part(
        made,
        path,
        labels_settings,
        schema.label_fields(new_form, classes),
        provenance={**old.provenance, "thinned_from": str(form)},
    )
    done = writer.committed_units(made, labels_part, range(store.num_units))
    source_labels = _Labels(store, found.labels[0], new_form)
    for unit in range(store.num_units):
        rows = store.unit_rows(unit)
        if unit not in done:
            failed = {r: w for r, w in found.failed.items() if rows.start <= r < rows.stop}
            drawn = reader.read_crops(store, found.crops, unit, count)
            values = {} if wanted.derived_boxes else rounds.values_of(drawn)
            facts = {"crops_crc32c": rounds.checksum(drawn)}
            without = _crops_failed(found.crops, failed)
            writer.commit_unit(made, crops_part, unit, values, failed=without, made=facts)
            kept = source_labels.unit(unit, count, failed)
            facts = found.labels[0][0].manifest.made.get(unit, {})
            writer.commit_unit(made, labels_part, unit, kept, failed=failed, made=facts)
        on_images(rows.stop - rows.start)
    for part in (made.part(IMAGES), crops_part, labels_part):
        writer.seal(made, part)
    return made


def _check_place(store: Store, location: Location, wanted: dict[str, Settings]) -> None:
    """Refuse to write where another store is, or a store that is no smaller.

    Args:
        wanted: settings of the new store's parts, by path.

    Raises:
        UsageError: it is the store itself, or would hold all that the store holds.
        StoreMismatchError: another store is there.
    """
    if location.url == store.url:
        raise UsageError(f"{store.url} is the store itself; name a new folder for the smaller one.")
    parts = {path: part.settings for path, part in store.parts.items() if path != IMAGES}
    if parts == wanted:
        raise UsageError(
            f"nothing of {store.url} would be left out. Say what is to be smaller: --crops M, a "
            "poorer --form, or --derive-boxes."
        )
    there = begin.find_store(location)  # refuses what is no store of ours
    if there is None or there.facts["fingerprint"] != store.facts["fingerprint"]:
        return  # of other images: refused where the list of images is begun
    for path, part in there.parts.items():
        if path != IMAGES and part.settings != wanted.get(path):
            raise StoreMismatchError(
                f"{location.url} holds a store with another {path}. Name a new folder, or give "
                "the options it was begun with to go on with it.",
                code="settings",
            )


def _check(form: Form, new: Form, classes: int) -> None:
    labels.check_form(new, classes)
    richness = {"hard": 0, "topk": 1, "full": 2, "logits": 3}
    poorer = richness[new.kind] <= richness[form.kind]
    if new.kind == form.kind == "topk":
        poorer = new.k <= form.k and (new.compact or not form.compact)
    if not poorer:
        raise StoreMismatchError(
            f"labels of form {form} cannot become {new}; thinning goes from logits to full to "
            "topk:K to topk:K:compact to hard, and to smaller K.",
            code="form-too-poor",
        )


def _create(store: Store, location: Location) -> Store:
    """A store of the same images in the same order, or the one that was begun there."""
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
    """Of the failed images of a unit, those that an import brought no crops for."""
    return {
        row: why for row, why in failed.items() if any(row in s.manifest.failed for s in segments)
    }


class _Labels:
    """Labels of a source, unit by unit, turned into another form."""

    def __init__(self, store: Store, segments: Sequence[Segment], new: Form) -> None:
        self.store, self.segments, self.new = store, segments, new
        self.part: Part[LabelSettings] = segments[0].part
        self.old, self.classes = self.part.settings.form, self.part.settings.classes

    def unit(self, unit: int, count: int, failed: dict) -> dict[str, np.ndarray]:
        """Stored fields of the new form, rows of failed images with fill values."""
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
        made = {f.name: writer.fill_rows(f, len(good), count) for f in fields}
        if good.any():
            flat = {n: v[good].reshape(-1, *v.shape[2:]) for n, v in old.items()}
            for name, values in self._convert(flat).items():
                made[name][good] = values.reshape(int(good.sum()), count, *values.shape[1:])
        return made

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
        if self.new.k == self.classes:  # every class is kept; nothing was renormalised away
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
        """ids and probabilities with the first class first; the others in any order."""
        ids, prob = labels.hybrid_order(ids, prob)
        dtype = labels.id_dtype(self.classes)
        if self.new.kind == "hard":
            return {"ids": ids[:, :1].astype(dtype)}
        kept = labels.encode_probabilities(self.new, prob)
        return {"ids": ids.astype(dtype), self.new.value_field: kept}
