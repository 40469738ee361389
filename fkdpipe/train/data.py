"""Training data: images, their crops, and their labels and features from a store.

With a store, the image folder is never scanned: the list of images, the boxes and the labels come
from the store. Without one (`ground-truth`), crops are sampled from the same distribution and the
folder's classes are the labels; teachers and baselines are trained this way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fkdpipe.common.errors import StoreMismatchError, UsageError
from fkdpipe.common.progress import Reporter, shared, silent
from fkdpipe.networks.features import FeatureLayer, StoredLayer
from fkdpipe.pixels import crops, images
from fkdpipe.pixels.crops import CropDistribution, Crops
from fkdpipe.storage import reader
from fkdpipe.storage.labels import Target
from fkdpipe.storage.schema import UNIT_IMAGES
from fkdpipe.storage.store import Store
from fkdpipe.train import stored
from fkdpipe.train.schedule import Pass
from fkdpipe.train.stored import Features, Labels

CHECKED_IMAGES = 32  # images whose size is compared with the record before a run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSet:
    """Everything the feed needs.

    Attributes:
        root: folder that keys are relative to.
        keys, class_N, size_N2: of all rows, in a fixed random order.
        rows: int64, the rows to train on. unit_size: rows per unit.
        crops: maps (rows_I, crops_m) to the parameters of those crops, (I, m).
        labels: None where the folder's classes are the labels. features: None if not needed.
        crops_per_image: M; None for an endless supply of crops.
        facts: description of the data for the run's record.
    """

    root: Path
    keys: np.ndarray
    class_N: np.ndarray
    size_N2: np.ndarray
    class_names: tuple[str, ...]
    rows: np.ndarray
    unit_size: int
    crops: Callable[[np.ndarray, np.ndarray], Crops]
    labels: Labels | None
    features: Features | None
    crops_per_image: int | None
    facts: dict[str, Any]

    def crops_of(self, passed: Pass) -> np.ndarray:
        """int64 (m,): crops that a pass uses; all are used once before any repeats."""
        crops_m = passed.first_crop + np.arange(passed.m)
        return crops_m if self.crops_per_image is None else crops_m % self.crops_per_image


def from_folder(
    data: Path,
    *,
    distribution: CropDistribution,
    seed: int,
    need_classes: bool = True,
    reporter: Reporter = silent,
) -> TrainingSet:
    """Fresh random crops of an image folder, which may be flat if no classes are needed.

    Raises:
        ImagesError: no usable images.
    """
    with reporter.task("scan", 0, "files") as advance:
        folder = images.scan(data, need_classes=need_classes, on_image=advance)
    for remark in images.remarks(folder):
        log.warning("%s", remark)
    ids = crops.image_ids(folder.keys)
    order = crops.random_order(seed, ids)
    ids, sizes = ids[order], folder.size_N2[order]

    def sample(rows_I: np.ndarray, crops_m: np.ndarray) -> Crops:
        return crops.sample(
            distribution, seed=seed, image_id_N=ids[rows_I], size_N2=sizes[rows_I], crops_M=crops_m
        )

    return TrainingSet(
        root=folder.root,
        keys=np.array(folder.keys, dtype=object)[order],
        class_N=folder.class_N[order],
        size_N2=sizes,
        class_names=folder.class_names,
        rows=np.arange(len(folder)),
        unit_size=UNIT_IMAGES,
        crops=sample,
        labels=None,
        features=None,
        crops_per_image=None,
        facts={"fingerprint": folder.fingerprint, "images": len(folder)},
    )


def from_store(
    store: Store,
    data: Path,
    *,
    target: Target,
    source: str | None,
    temperature: float | None,
    features: StoredLayer | None = None,
    cache_dir: Path,
    allow_partial: bool = False,
    crops_per_image: int | None = None,
    reporter: Reporter = silent,
) -> TrainingSet:
    """Recorded crops, with stored labels unless the target is `ground-truth`.

    Args:
        features: feature layer to read as well.
        crops_per_image: number of crops that the run began with; the store may have grown since.

    Raises:
        StoreError: not sealed, no such source, damaged, or made from another folder.
        StoreMismatchError: the stored form cannot serve the target or the temperature, or images
            have another size than recorded.
    """
    root = images.split_root(data, "train")
    listed = store.images
    try:
        images.check_same_classes(listed.class_names, images.class_folders(root), where=str(root))
    except images.ImagesError as error:
        raise StoreMismatchError(f"{store.url} was made from other images: {error}") from error
    parts = []
    if target.kind != "ground-truth":
        parts.append(("labels", reader.choose_source(store, source), ""))
    if features is not None:
        parts.append(("features", *_feature_source(store, source, features)))
    finished = reader.finished(store, parts, allow_partial=allow_partial, crops=crops_per_image)
    if not len(finished.rows):
        raise UsageError(f"{store.url} has no finished image to train on.")
    stored_target = None if target.kind == "ground-truth" else target
    boxes, labels = _open_readers(store, finished, stored_target, temperature, cache_dir, reporter)
    training = TrainingSet(
        root=root,
        keys=listed.keys,
        class_N=listed.class_N,
        size_N2=listed.size_N2,
        class_names=listed.class_names,
        rows=finished.rows,
        unit_size=store.unit_size,
        crops=boxes,
        labels=labels,
        features=None if features is None else Features(store, finished.labels[-1]),
        crops_per_image=finished.crops_per_image,
        facts={
            "fingerprint": store.facts["fingerprint"],
            "images": len(finished.rows),
            "left_out": len(finished.failed),
            "crops_per_image": finished.crops_per_image,
            "sources": ["/".join(filter(None, part)) for part in parts],
            "manifests": [
                [s.manifest.settings for s in p] for p in (finished.crops, *finished.labels)
            ],
        },
    )
    _check_sizes(training)
    return training


def _open_readers(
    store: Store,
    finished: reader.Finished,
    target: Target | None,
    temperature: float | None,
    cache_dir: Path,
    reporter: Reporter,
) -> tuple[Callable[[np.ndarray, np.ndarray], Crops], Labels | None]:
    """Readers of boxes and, for a target, of labels. Fills the cache of sparse labels."""
    sparse = target is not None and reader.label_form(finished.labels[0]).sparse
    lists = len(finished.crops) + (len(finished.labels[0]) if sparse else 0)  # of cached values
    with reporter.task("labels", store.num_images, "images") as advance_images:
        advance = shared(advance_images, lists)
        boxes = reader.CropReader(store, finished.crops, cache_dir, advance)
        labels = None
        if target is not None:
            labels = stored.open_labels(
                store, finished.labels[0], target, temperature, cache_dir, advance
            )
    return boxes.take, labels


def _check_sizes(training: TrainingSet) -> None:
    """Check on a sample, before hours are spent, that images have their recorded size.

    Raises:
        StoreMismatchError: a size differs, or most of the sample cannot be read.
    """
    some = training.rows[:: max(1, len(training.rows) // CHECKED_IMAGES)]
    unreadable = []
    for row in some.tolist():
        key = training.keys[row]
        size = images.size_of(training.root, key)
        recorded = tuple(training.size_N2[row].tolist())
        if isinstance(size, images.Rejected):
            unreadable.append(size)
        elif size != recorded:
            now, then = (f"{height}x{width}" for height, width in (size, recorded))
            raise StoreMismatchError(
                f"{training.root}: {key} is {now} pixels (height x width), recorded as {then}. The "
                "labels belong to crops of the original images; give the folder that the store "
                "was made from.",
                code="size-differs",
            )
    if len(unreadable) > len(some) // 2:
        first = unreadable[0]
        raise StoreMismatchError(
            f"{training.root}: {len(unreadable)} of {len(some)} sampled images cannot be read, "
            f"for example {first.key}: {first.detail}.",
            code="images-lost",
        )


def take_fraction(training: TrainingSet, fraction: float, seed: int) -> TrainingSet:
    """A fraction of the images of every class, the same for any store or folder that lists them."""
    keys = [str(key) for key in training.keys[training.rows]]
    order = crops.random_order(seed, crops.image_ids(keys))
    kept = crops.per_class(training.class_N[training.rows], order, fraction)
    facts = {**training.facts, "images": len(kept), "fraction": fraction}
    return replace(training, rows=np.sort(training.rows[kept]), facts=facts)


def _feature_source(
    store: Store, source: str | None, layer: StoredLayer
) -> tuple[str, StoredLayer]:
    """(source, layer) of the features; in transformers, pre and post are the same."""
    if layer == "map":
        return reader.choose_source(store, source, "features", layer), layer
    other: FeatureLayer = "post" if layer == "pre" else "pre"
    same = [
        part.source
        for part in store.parts.values()
        if part.kind == "features" and part.layer == other and part.settings.pre_is_post
    ]
    if not store.sources("features", layer) and same:
        return reader.choose_source(store, source, "features", other), other
    return reader.choose_source(store, source, "features", layer), layer


def check_crops(training: TrainingSet, crops_per_image: int) -> None:
    """Raises UsageError when a batch is to have more crops of an image than are recorded."""
    recorded = training.crops_per_image
    if recorded is not None and crops_per_image > recorded:
        raise UsageError(
            f"{crops_per_image} crops per image in a batch, and the store records {recorded}."
        )
