"""Import labels of another system into an ordinary store: unit by unit, resumable, sealed.

Only one unit's labels are in memory at a time, whatever the number of files. An image without
usable labels gets fill values and is listed, with the reason, in its unit's markers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fkdpipe.common import words
from fkdpipe.common.errors import LabelsError, StoreMismatchError
from fkdpipe.common.progress import Reporter, keeping, silent
from fkdpipe.interchange.source import (
    DAMAGE,
    SEED_FIELD,
    ImageLabels,
    ImportSettings,
    LabelSource,
    check,
)
from fkdpipe.interchange.torchfile import BrokenFileError
from fkdpipe.pixels import crops, images
from fkdpipe.pixels.crops import Crops
from fkdpipe.pixels.images import ImageFolder
from fkdpipe.storage import begin, labels, rounds, schema, writer
from fkdpipe.storage.claims import Claim
from fkdpipe.storage.location import Location
from fkdpipe.storage.schema import Json
from fkdpipe.storage.settings import LabelSettings
from fkdpipe.storage.store import IMAGES, Part, Store

log = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.5  # of a unit: more looks like the wrong folder, not broken files
EXAMPLES = 20

Result = ImageLabels | BrokenFileError
Values = dict[str, np.ndarray]


@dataclass
class Imported:
    """The result of an import.

    Attributes:
        source: name of the labels in the store.
        made, kept: units committed by this run, and before.
        failed: reason code to number of images. examples: some of them, key and reason.
        moved: boxes moved back into their image, since float16 rounding had put them outside.
        notes: of the label source.
    """

    store: Store
    form: str
    crops: int
    source: str = ""
    made: int = 0
    kept: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    moved: int = 0
    notes: tuple[str, ...] = ()


def import_labels(
    source: LabelSource,
    folder: ImageFolder,
    location: Location,
    settings: ImportSettings,
    *,
    reporter: Reporter = silent,
) -> Imported:
    """Write opened label files to a store; a second call imports only what is missing.

    Args:
        folder: the images the labels belong to. location: of the store.

    Raises:
        LabelsError: most images of a unit have no usable labels, or the labels have more classes
            than the folder and `settings.classes` is not set.
        StoreMismatchError: the location holds a store of other images or labels.
        ClaimedError: another process is writing to it.
    """
    labels.check_form(source.form, source.classes)
    for note in source.all_notes():
        log.warning("%s", note)
    store = _open_or_create(location, folder, source, settings)
    order = crops.random_order(int(store.facts["order_seed"]), crops.image_ids(folder.keys))
    parts = _parts(store, source, settings)
    result = Imported(
        store, str(source.form), source.crops, parts[1].source, notes=source.all_notes()
    )
    units = range(store.num_units)
    with (
        keeping(lambda: words.units_kept(result.kept + result.made, len(units))),
        Claim(location, 0, 1) as claim,
        ThreadPoolExecutor(settings.threads) as pool,
        reporter.task("import", len(folder), "images") as advance,
    ):
        writer.sweep(store, 0, 1)
        done = set.intersection(*(writer.committed_units(store, part, units) for part in parts))
        result.kept = len(done)
        for unit in units:
            rows = store.unit_rows(unit)
            if unit not in done:
                unit_ = _Unit(store, source, folder, order[rows], unit)
                results = list(pool.map(unit_.read, range(rows.stop - rows.start)))
                claim.check()
                unit_.commit(results, parts, result)
            advance(rows.stop - rows.start)
        for part in (store.part(IMAGES), *parts):
            writer.seal(store, part)
    return result


def _open_or_create(
    location: Location, folder: ImageFolder, source: LabelSource, settings: ImportSettings
) -> Store:
    store = begin.find_store(location)
    if store is not None:
        if store.facts["fingerprint"] != folder.fingerprint:
            raise StoreMismatchError(
                f"{store.url} holds labels of other images than those in {folder.root}.",
                code="other-images",
            )
        return store
    fields = [*schema.crop_fields(), *source.fields]
    fields += schema.label_fields(source.form, source.classes)
    columns = writer.ImageColumns(
        keys=folder.keys,
        class_N=folder.class_N,
        size_N2=folder.size_N2,
        bytes_N=folder.bytes_N,
        class_names=folder.class_names,
        rejected=[(r.key, r.reason, r.detail) for r in folder.rejected],
        fingerprint=folder.fingerprint,
    )
    unit = schema.unit_images(schema.bytes_per_image(fields, source.crops))
    return writer.create_store(location, columns, seed=settings.seed, unit=unit)


def _parts(store: Store, source: LabelSource, settings: ImportSettings) -> tuple[Part, Part]:
    """The crops and the labels part, started now or before."""
    name = settings.source or _source_name(settings.teacher) or source.format
    origin = {"format": source.format, "fingerprint": source.fingerprint, **source.origin}
    temperature = settings.temperature
    fields = [*schema.crop_fields(), *source.fields]
    distribution = source.distribution
    if distribution.imported:
        distribution = replace(distribution, others={**distribution.others, "labels": origin})
    crops_part = writer.add_part(store, "rounds/0/crops", distribution, fields)
    recorded = LabelSettings(
        form=source.form,
        classes=source.classes,
        crops=source.crops,
        temperature=source.temperature if temperature is None else temperature,
        teachers=({"name": settings.teacher or None},),
        imported_from=origin,
    )
    labels_part = writer.add_part(
        store,
        f"rounds/0/labels/{name}",
        recorded,
        schema.label_fields(source.form, source.classes),
        provenance={
            "teachers": [settings.teacher or None],
            "packages": writer.package_versions(),
            **source.provenance,
        },
    )
    return crops_part, labels_part


def _source_name(teacher: str) -> str:
    return teacher.replace(":", "-").replace("/", "-")


@dataclass(frozen=True)
class _Unit:
    """A unit in progress. position_U: positions of its images in the folder."""

    store: Store
    source: LabelSource
    folder: ImageFolder
    position_U: np.ndarray
    number: int

    def read(self, index: int) -> Result:
        """The checked labels of one image, or what is wrong with them."""
        position = int(self.position_U[index])
        try:
            labels_ = self.source.read(position)
            return check(labels_, self.source, self.folder.size_N2[position].tolist())
        except BrokenFileError as error:
            return error
        except DAMAGE as error:
            return BrokenFileError("broken-label", f"{type(error).__name__}: {error}")

    def commit(self, images_: Sequence[Result], parts: tuple[Part, Part], result: Imported) -> None:
        """Commit the labels of a unit's images, and add them to the result."""
        first = self.store.unit_rows(self.number).start
        failed = {
            first + index: (entry.code, str(entry))
            for index, entry in enumerate(images_)
            if isinstance(entry, BrokenFileError)
        }
        self._refuse(failed, len(images_))
        good = [index for index, entry in enumerate(images_) if isinstance(entry, ImageLabels)]
        usable = [entry for entry in images_ if isinstance(entry, ImageLabels)]
        count = (len(images_), self.source.crops)
        crop_values = _filled(parts[0], count, good, _crop_values(usable))
        crc = rounds.checksum(Crops(crop_values["box"], crop_values["flip"]))
        moved = sum(entry.moved for entry in usable)
        facts: Json = {"crops_crc32c": crc, **({"moved_boxes": moved} if moved else {})}
        label_values = _filled(parts[1], count, good, _label_values(usable, self.source))
        writer.commit_unit(
            self.store, parts[0], self.number, crop_values, failed=failed, facts=facts
        )
        writer.commit_unit(self.store, parts[1], self.number, label_values, failed=failed)
        result.made += 1
        result.moved += moved
        result.failed.update(code for code, _ in failed.values())
        for row, (code, detail) in failed.items():
            if len(result.examples) < EXAMPLES:
                key = self.store.images.keys[row]
                result.examples.append(f"{key}: {code}, {detail}")
                log.warning("%s is left out: %s, %s", key, code, detail)

    def _refuse(self, failed: dict[int, tuple[str, str]], count: int) -> None:
        """Stop the import if the labels cannot be meant for these images."""
        keys = self.store.images.keys
        for row, (code, detail) in failed.items():
            if code == "class-range" and not self.source.classes_known:
                raise LabelsError(
                    f"the label of {keys[row]} names {detail}, the number of class folders. Set "
                    "the teacher's number of classes: --classes C.",
                    code="classes",
                )
        if len(failed) > MAX_FAILED_SHARE * count:
            examples = "; ".join(
                f"{keys[row]}: {code}, {detail}" for row, (code, detail) in [*failed.items()][:3]
            )
            raise LabelsError(
                f"{len(failed)} of {count} images of unit {self.number} have no usable labels, for "
                f"example {examples}. Are these the images the labels were made for?",
                code="wrong-folder",
            )


def _filled(part: Part, count: tuple[int, int], good: list[int], values: Values) -> Values:
    """The fields of a part for a whole unit; images that failed get fill values."""
    whole = {}
    for f in part.fields:
        whole[f.name] = writer.fill_rows(f, *count)
        if good:
            whole[f.name][good] = values[f.name].reshape(len(good), count[1], *f.shape)
    return whole


def _crop_values(usable: Sequence[ImageLabels]) -> Values:
    if not usable:
        return {}
    values = {
        "box": np.stack([entry.box_M4 for entry in usable]).astype(np.uint16),
        "flip": np.stack([entry.flip_M for entry in usable]),
    }
    seeds = [entry.seed_M for entry in usable if entry.seed_M is not None]
    return {**values, SEED_FIELD.name: np.stack(seeds)} if seeds else values


def _label_values(usable: Sequence[ImageLabels], source: LabelSource) -> Values:
    """Stored fields of all crops of the images, B = images * M rows."""
    if not usable:
        return {}
    form, dtype = source.form, labels.id_dtype(source.classes)
    if form.kind == "logits":
        largest = [e.logit_MC.max(axis=1).astype(np.float32) for e in usable]  # type: ignore[union-attr]
        scores = [
            labels.encode_scores(e.logit_MC.astype(np.float32) - top[:, None])  # type: ignore[union-attr]
            for e, top in zip(usable, largest, strict=True)
        ]
        return {"logit": np.stack(scores), "logit_max": np.stack(largest)}
    ids = np.concatenate([entry.ids_MK for entry in usable if entry.ids_MK is not None])
    if form.kind == "hard":
        return {"ids": ids.astype(dtype)}
    prob = np.concatenate([entry.prob_MK for entry in usable if entry.prob_MK is not None])
    rank = np.argsort(-prob, axis=1, kind="stable")
    ids, prob = labels.hybrid_order(
        np.take_along_axis(ids, rank, 1), np.take_along_axis(prob, rank, 1)
    )
    return {"ids": ids.astype(dtype), "prob": labels.encode_probabilities(form, prob)}


def scan(data: Path, reporter: Reporter = silent) -> ImageFolder:
    """The images to match with the labels."""
    with reporter.task("scan", 0, "files") as advance:
        return images.scan(data, need_classes=False, on_image=advance)
