"""From settings to a run: everything checked, built and wired before the first step."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fkdpipe import config, images, models, replay
from fkdpipe.distributed import Rank, default_threads
from fkdpipe.errors import ImagesError, TrainingError, UsageError
from fkdpipe.progress import Reporter, silent
from fkdpipe.replay import Backend, Request
from fkdpipe.storage import schema
from fkdpipe.storage.store import Store
from fkdpipe.teachers import Precision
from fkdpipe.train import inputs, methods, optim, students
from fkdpipe.train.feed import Feed, check_batch
from fkdpipe.train.inputs import TrainingSet
from fkdpipe.train.loop import Run
from fkdpipe.train.methods.interface import Context
from fkdpipe.train.order import Order
from fkdpipe.train.schedule import passes
from fkdpipe.train.settings import TrainSettings

log = logging.getLogger(__name__)


def prepare(
    settings: TrainSettings,
    data: Path,
    out: Path,
    *,
    store: Store | None = None,
    cache_dir: Path,
    allow_partial: bool = False,
    device: torch.device,
    rank: Rank = Rank(),
    reporter: Reporter = silent,
) -> Run:
    """Open the data, build the student and the method, and compare with an earlier start.

    Args:
        store: labels and crops; None for `ground-truth` on fresh crops.

    Raises:
        UsageError: settings that do not go together.
        TrainingError: the run folder holds another run.
        StoreError, ImagesError, ModelError: what they say.
    """
    _check(settings, store, rank)
    training = _open(settings, data, store, cache_dir, allow_partial, reporter)
    if training.crops_per_image is not None and settings.crops_per_image > training.crops_per_image:
        raise UsageError(
            f"{settings.crops_per_image} crops per image in a batch, and the store records "
            f"{training.crops_per_image}."
        )
    labels = training.labels
    classes = len(training.class_names) if labels is None else labels.classes
    loaded = students.build(settings, classes)
    loaded.module.to(device).to(memory_format=torch.channels_last)
    validation = _validation(data, training, reporter)
    digest = _record(settings, training, out)
    feed = Feed(
        training,
        _order(settings, training),
        students.view(settings, loaded),
        backend=_backend(settings, training, store, device),
        threads=settings.threads or default_threads(),
        device=device,
        rank=rank,
    )
    method = methods.build(settings.method, Context(classes=classes)).to(device)
    return Run(
        settings=settings,
        out=out,
        feed=feed,
        student=loaded,
        method=method,
        optimizer=optim.build(loaded.module, method, settings.optimizer),
        device=device,
        precision=_precision(settings, device),
        rank=rank,
        class_names=training.class_names,
        validation=validation,
        digest=digest,
        reporter=reporter,
    )


def _check(settings: TrainSettings, store: Store | None, rank: Rank) -> None:
    """What can be refused before anything is opened."""
    target = settings.parsed_target
    if store is None and target.kind != "ground-truth":
        raise UsageError(
            f"target {target} needs a store of labels: fkdpipe train DATA STORE --target {target}. "
            "Only --target ground-truth trains without one."
        )
    methods.parse(settings.method)
    models.parse_spec(settings.student)
    check_batch(settings.batch_size, settings.crops_per_image, rank.world)


def _order(settings: TrainSettings, training: TrainingSet) -> Order:
    return Order(
        training.rows,
        unit_size=training.unit_size,
        window=settings.window,
        passes=passes(
            settings.epochs,
            settings.crops_per_image,
            single_first=settings.schedule.single_first,
            single_last=settings.schedule.single_last,
        ),
        batch_size=settings.batch_size,
        seed=settings.seed,
    )


def _open(
    settings: TrainSettings,
    data: Path,
    store: Store | None,
    cache_dir: Path,
    allow_partial: bool,
    reporter: Reporter,
) -> TrainingSet:
    if store is None:
        return inputs.from_folder(data, law=settings.crop, seed=settings.seed, reporter=reporter)
    return inputs.from_store(
        store,
        data,
        target=settings.parsed_target,
        source=settings.source,
        temperature=settings.label_temperature,
        cache_dir=cache_dir,
        allow_partial=allow_partial,
        reporter=reporter,
    )


def _validation(data: Path, training: TrainingSet, reporter: Reporter) -> images.ImageFolder | None:
    """Held-out images, when the folder has a val/ beside its train/."""
    try:
        images.split_root(data, "val")
    except ImagesError:
        log.info("no val/ folder: the student is not evaluated while it trains")
        return None
    with reporter.task("scan", 0, "files") as advance:
        folder = images.scan(data, split="val", on_image=advance)
    images.check_same_classes(training.class_names, folder.class_names, where=str(folder.root))
    return folder


def _record(settings: TrainSettings, training: TrainingSet, out: Path) -> str:
    """Write settings.json, or compare with the one there; returns the digest of both.

    Raises:
        TrainingError: the folder holds a run with other settings; says which.
    """
    record: dict[str, Any] = {
        "settings": config.to_table(settings),
        "data": training.facts,
        "class_names": list(training.class_names),
    }
    free = ("threads", "replay", "log_every")  # may differ between two starts of one run
    compared = {
        **record,
        "settings": {k: v for k, v in record["settings"].items() if k not in free},
    }
    digest = schema.digest(compared)
    file = out / "settings.json"
    if file.exists():
        old = json.loads(file.read_text())
        if old.get("digest") != digest:
            fresh = json.loads(json.dumps(record))
            changed = schema.differences(
                {k: old.get(k, {}) for k in ("settings", "data")},
                {k: fresh[k] for k in ("settings", "data")},
            )
            raise TrainingError(
                f"{out} holds a run with other settings: {'; '.join(changed) or 'other classes'}. "
                "Name another --out folder, or delete this one.",
                code="other-run",
            )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"digest": digest, **record}, indent=1) + "\n")
    return digest


def _precision(settings: TrainSettings, device: torch.device) -> Precision:
    if settings.precision != "auto":
        return settings.precision
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return "bfloat16"
    return "float32"


def _backend(
    settings: TrainSettings, training: TrainingSet, store: Store | None, device: torch.device
) -> Backend:
    rows = training.rows[: min(8, len(training.rows))]
    box, flip = training.boxes(rows, np.arange(min(2, training.crops_per_image or 2)))
    sample = Request(
        paths=[images.path_of(training.root, key) for key in training.keys[rows]],
        size_I2=training.size_N2[rows],
        box_Im4=box,
        flip_Im=flip,
    )
    backend = replay.choose_backend(settings.replay, device, sample)
    made = {
        part.settings["replay"]
        for part in (store.parts.values() if store else [])
        if part.kind == "labels" and part.settings["replay"]  # unknown of imported labels
    }
    if made and backend not in made:
        log.warning(
            "the labels were made with the %s replay and training takes %s: pixels differ slightly",
            ", ".join(sorted(made)),
            backend,
        )
    return backend
