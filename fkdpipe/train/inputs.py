"""What a student is trained on: images, their crops, their labels.

From a store, the folder is never scanned: the list, the boxes and the labels come from it. Without
one (`ground-truth`), crops are drawn fresh from the same law and the folder's classes are the
labels; that is how a teacher or a baseline is trained.
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
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import reader
from fkdpipe.storage.labels import Target
from fkdpipe.storage.schema import UNIT_IMAGES
from fkdpipe.storage.store import Store
from fkdpipe.train import stored
from fkdpipe.train.schedule import Pass
from fkdpipe.train.stored import Features, Labels

Boxes = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
Factors = Callable[[np.ndarray, np.ndarray], np.ndarray]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSet:
    """Everything the feed needs.

    Attributes:
        root: folder that keys are relative to.
        keys, class_N, size_N2: of all rows, in a fixed random order.
        rows: int64, the rows to train on. unit_size: rows per unit.
        boxes: (rows_I, crops_m) -> (box_Im4, flip_Im).
        labels: None where the folder's classes are the labels. features: None when not asked for.
        crops_per_image: M; None when crops never end.
        facts: for the run's record: what it was trained on.
        jitter: (rows_I, crops_m) -> float32 (I, m, 4) colour factors; None without colour jitter.
    """

    root: Path
    keys: np.ndarray
    class_N: np.ndarray
    size_N2: np.ndarray
    class_names: tuple[str, ...]
    rows: np.ndarray
    unit_size: int
    boxes: Boxes
    labels: Labels | None
    features: Features | None
    crops_per_image: int | None
    facts: dict[str, Any]
    jitter: Factors | None = None

    def crops_of(self, passed: Pass) -> np.ndarray:
        """int64 (m,): which crops of each image a pass uses: each once before any repeats."""
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
    """Fresh random crops of a folder, flat only where no classes are needed.

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

    def boxes(rows_I: np.ndarray, crops_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        drawn = crops.sample(
            distribution, seed=seed, image_id_N=ids[rows_I], size_N2=sizes[rows_I], crops_M=crops_m
        )
        return drawn.box_NM4, drawn.flip_NM

    def factors(rows_I: np.ndarray, crops_m: np.ndarray) -> np.ndarray:
        assert distribution.jitter is not None
        return crops.sample_jitter(
            distribution.jitter, seed=seed, image_id_N=ids[rows_I], crops_M=crops_m
        )

    return TrainingSet(
        root=folder.root,
        keys=np.array(folder.keys, dtype=object)[order],
        class_N=folder.class_N[order],
        size_N2=sizes,
        class_names=folder.class_names,
        rows=np.arange(len(folder)),
        unit_size=UNIT_IMAGES,
        boxes=boxes,
        labels=None,
        features=None,
        crops_per_image=None,
        facts={"fingerprint": folder.fingerprint, "images": len(folder)},
        jitter=None if distribution.jitter is None else factors,
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
        features: which of the source's features are wanted too.
        crops_per_image: as many as a run began with, where the store may have grown since.

    Raises:
        StoreError: not sealed, no such source, damaged, or made for another folder.
        StoreMismatchError: the stored form cannot serve the target or the temperature.
    """
    root = images.split_root(data, "train")
    listed = store.images
    try:
        images.check_same_classes(listed.class_names, images.class_folders(root), where=str(root))
    except images.ImagesError as error:
        raise StoreMismatchError(f"{store.url} was made for other images: {error}") from error
    wanted = []
    if target.kind != "ground-truth":
        wanted.append(("labels", reader.choose_source(store, source), ""))
    if features is not None:
        wanted.append(("features", *_feature_source(store, source, features)))
    found = reader.finished(store, wanted, allow_partial=allow_partial, crops=crops_per_image)
    if not len(found.rows):
        raise UsageError(f"{store.url} has no finished image to train on.")
    narrow = target.kind != "ground-truth" and reader.label_form(found.labels[0]).sparse
    lists = len(found.crops) + (len(found.labels[0]) if narrow else 0)  # of cached values
    with reporter.task("labels", store.num_images, "images") as told:
        advance = shared(told, lists)
        boxes = reader.CropReader(store, found.crops, cache_dir, advance)
        labels: Labels | None = None
        if target.kind != "ground-truth":
            labels = stored.open_labels(
                store, found.labels[0], target, temperature, cache_dir, advance
            )
    return TrainingSet(
        root=root,
        keys=listed.keys,
        class_N=listed.class_N,
        size_N2=listed.size_N2,
        class_names=listed.class_names,
        rows=found.rows,
        unit_size=store.unit_size,
        boxes=boxes.take,
        labels=labels,
        features=None if features is None else stored.FeatureStore(store, found.labels[-1]),
        crops_per_image=found.crops_per_image,
        facts={
            "fingerprint": store.facts["fingerprint"],
            "images": len(found.rows),
            "left_out": len(found.failed),
            "crops_per_image": found.crops_per_image,
            "sources": ["/".join(filter(None, part)) for part in wanted],
            "manifests": [[s.manifest.settings for s in p] for p in (found.crops, *found.labels)],
        },
        jitter=boxes.jitter if boxes.jittered else None,
    )


def take_fraction(training: TrainingSet, fraction: float, seed: int) -> TrainingSet:
    """A share of the images of every class: the same images whatever store or folder lists them."""
    keys = [str(key) for key in training.keys[training.rows]]
    order = crops.random_order(seed, crops.image_ids(keys))
    kept = images.per_class(training.class_N[training.rows], order, fraction)
    facts = {**training.facts, "images": len(kept), "fraction": fraction}
    return replace(training, rows=np.sort(training.rows[kept]), facts=facts)


def _feature_source(
    store: Store, source: str | None, layer: StoredLayer
) -> tuple[str, StoredLayer]:
    """(source, layer) of the features asked for; transformers' are the same before and after."""
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
