"""Build a run from its settings: check them, open the data, build the networks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from fkdpipe.common import config
from fkdpipe.common.distributed import Rank, default_threads
from fkdpipe.common.errors import ImagesError, TrainingError, UsageError
from fkdpipe.common.progress import Reporter, silent
from fkdpipe.networks import models
from fkdpipe.networks.feature_layers import Needs
from fkdpipe.networks.features import StoredLayer
from fkdpipe.networks.models import Loaded, ModelSpec, Preprocessing
from fkdpipe.networks.teachers import Precision, Teacher, load_teachers
from fkdpipe.pixels import images
from fkdpipe.pixels.replay import View
from fkdpipe.storage import schema
from fkdpipe.storage.store import Store
from fkdpipe.train import (
    checkpoint,
    checks,
    exclusive,
    labelled_crops,
    methods,
    optim,
    parallel,
    students,
)
from fkdpipe.train import data as training_data
from fkdpipe.train.data import TrainingSet
from fkdpipe.train.feed import Feed
from fkdpipe.train.labelled_crops import LabelledCrops
from fkdpipe.train.learner import build as build_learner
from fkdpipe.train.learner import parameters
from fkdpipe.train.methods.interface import MethodNeeds
from fkdpipe.train.order import Order
from fkdpipe.train.schedule import stages
from fkdpipe.train.settings import TrainSettings
from fkdpipe.train.state import Run

log = logging.getLogger(__name__)


def prepare(
    settings: TrainSettings,
    data: Path,
    out: Path,
    *,
    student_spec: ModelSpec | None = None,
    teacher_spec: ModelSpec | None = None,
    store: Store | None = None,
    cache_dir: Path,
    allow_partial: bool = False,
    device: torch.device,
    rank: Rank = Rank(),
    reporter: Reporter = silent,
) -> Run:
    """Open the data, build the student and the method, and check the run folder.

    Args:
        student_spec, teacher_spec: override the networks in the settings. A command line may name
            Python code, which settings may not.
        store: labels and crops; None for `ground-truth` on fresh crops.

    Raises:
        UsageError: incompatible settings.
        TrainingError: the run folder holds another run, or another process is writing it.
        StoreError, ImagesError, ModelError: the store, images or networks cannot be used.
    """
    needs = methods.needs(settings.method)
    student_spec = student_spec or models.parse_spec(settings.student)
    teacher_spec = teacher_spec or _parse(settings.teacher)
    checks.check_out(out, data)
    if rank.main:
        exclusive.check(out)
    settings = dataclasses.replace(settings, target=checks.target(settings, needs, store))
    checks.check(settings, needs, store, rank, device)
    previous_crops = _previous_crops(out)
    with parallel.local_first(rank, device) if store else contextlib.nullcontext():
        training = _open(
            settings, needs, data, store, cache_dir, allow_partial, previous_crops, reporter
        )
    loaded = students.build(settings, student_spec, _classes(settings, needs, training))
    loaded.module.to(device).to(memory_format=torch.channels_last)
    teacher = _teacher(settings, teacher_spec, needs, training, device)
    live_teacher = None if needs.stored else teacher
    learner = build_learner(settings, needs, loaded, teacher, training, device)
    # An untrained classifier cannot be evaluated.
    validation = _validation(data, training, reporter) if needs.classifier else None
    counts = parameters(learner)
    log.info("%(student)d parameters in the student, %(auxiliary)d in auxiliary modules", counts)
    digest = _record(settings, training, teacher, counts, out, write=rank.main)
    run = Run(
        settings=settings,
        out=out,
        crops=_crops(settings, needs, training, store, loaded, live_teacher, device, rank),
        student=loaded,
        learner=learner,
        wrapped=learner,
        teacher=live_teacher,
        optimizer=optim.build(learner, settings.optimizer),
        scaler=_scaler(settings, device),
        average=ModelEmaV3(learner.student, decay=settings.ema) if settings.ema else None,
        device=device,
        precision=_precision(settings, device),
        rank=rank,
        class_names=training.class_names,
        validation=validation,
        digest=digest,
        reporter=reporter,
    )
    checks.warn_of_few_steps(run.steps, len(training.rows), settings)
    return run


def _parse(teacher: str | None) -> ModelSpec | None:
    return None if teacher is None else models.parse_spec(teacher)


def _crops(
    settings: TrainSettings,
    needs: MethodNeeds,
    training: TrainingSet,
    store: Store | None,
    loaded: Loaded,
    teacher: Teacher | None,
    device: torch.device,
    rank: Rank,
) -> LabelledCrops:
    preprocessing = _preprocessing(settings, loaded, teacher)
    feed = Feed(
        training,
        _order(settings, needs, training),
        list(dict.fromkeys(View.of(p) for p in preprocessing)),
        backend=labelled_crops.choose_backend(settings.replay, training, store, device),
        threads=settings.threads or default_threads(),
        device=device,
        rank=rank,
        block=settings.mixing.block if settings.mixing.on else 1,
    )
    return LabelledCrops.of(feed, preprocessing)


def _order(settings: TrainSettings, needs: MethodNeeds, training: TrainingSet) -> Order:
    return Order(
        training.rows,
        unit_size=training.unit_size,
        window=settings.window,
        stages=stages(
            settings.epochs,
            settings.crops_per_image,
            single_first=settings.schedule.single_first,
            single_last=settings.schedule.single_last,
        ),
        batch_size=settings.batch_size,
        seed=settings.seed,
        independent=needs.independent,
    )


def _teacher(
    settings: TrainSettings,
    spec: ModelSpec | None,
    needs: MethodNeeds,
    training: TrainingSet,
    device: torch.device,
) -> Teacher | None:
    if spec is None:
        return None
    class_map = settings.teacher_class_map
    labels = needs.soft is not None and settings.parsed_target.kind == "ground-truth"
    (teacher,) = load_teachers(
        [spec],
        class_names=training.class_names if labels else (),
        class_maps=[class_map] if class_map else [],
        precision=_precision(settings, device),
        device=device,
        needs=needs.teacher or Needs(),
        size=(settings.teacher_size, settings.teacher_size) if settings.teacher_size else None,
    )
    return teacher


def _classes(settings: TrainSettings, needs: MethodNeeds, training: TrainingSet) -> int:
    """Output width of the student; if its classifier is not trained, the folder's classes or 1."""
    folder_classes = max(1, len(training.class_names))
    if training.labels is None or needs.scores:
        return folder_classes
    if training.labels.scores:
        raise UsageError(
            f"the stored labels are {training.labels.classes} scores of a self-supervised teacher, "
            "not class probabilities. Train with --method selfsup."
        )
    return training.labels.classes


def _preprocessing(
    settings: TrainSettings, loaded: Loaded, teacher: Teacher | None
) -> list[Preprocessing]:
    """Preprocessing of the student and of the live teacher."""
    student = loaded.preprocessing
    if settings.interpolation is not None:
        student = dataclasses.replace(student, interpolation=settings.interpolation)
    return [student] if teacher is None else [student, teacher.preprocessing]


def _open(
    settings: TrainSettings,
    needs: MethodNeeds,
    data: Path,
    store: Store | None,
    cache_dir: Path,
    allow_partial: bool,
    previous_crops: int | None,
    reporter: Reporter,
) -> TrainingSet:
    if store is None:
        training = training_data.from_folder(
            data,
            distribution=settings.crop,
            seed=settings.seed,
            need_classes=needs.classifier,
            reporter=reporter,
        )
    else:
        training = training_data.from_store(
            store,
            data,
            target=settings.parsed_target,
            source=settings.source,
            temperature=needs.soft if needs.soft is not None else settings.label_temperature,
            features=_stored_layer(settings, needs),
            cache_dir=cache_dir,
            allow_partial=allow_partial,
            crops_per_image=previous_crops,
            reporter=reporter,
        )
    training_data.check_crops(training, settings.crops_per_image)
    if settings.fraction < 1:
        training = training_data.take_fraction(training, settings.fraction, settings.seed)
    return training


def _previous_crops(out: Path) -> int | None:
    """Crops per image at the run's first start; the store may have grown since."""
    file = out / "settings.json"
    return json.loads(file.read_text())["data"].get("crops_per_image") if file.exists() else None


def _stored_layer(settings: TrainSettings, needs: MethodNeeds) -> StoredLayer | None:
    """The layer of the stored features that replace a live teacher; None if not needed."""
    if needs.teacher is None or (settings.teacher is not None and not needs.stored):
        return None
    if needs.teacher.final:
        return "map"
    return "pre" if needs.teacher.pre else "post"


def _validation(data: Path, training: TrainingSet, reporter: Reporter) -> images.ImageFolder | None:
    """The validation images; None if the folder has no val/."""
    try:
        images.split_root(data, "val")
    except ImagesError as error:
        log.warning("no evaluation during training: %s", error)
        return None
    with reporter.task("scan", 0, "files") as advance:
        folder = images.scan(data, split="val", on_image=advance)
    for remark in images.remarks(folder):
        log.warning("val: %s", remark)
    images.check_same_classes(training.class_names, folder.class_names, where=str(folder.root))
    return folder


def _record(
    settings: TrainSettings,
    training: TrainingSet,
    teacher: Teacher | None,
    counts: dict[str, int],
    out: Path,
    *,
    write: bool,
) -> str:
    """Write settings.json, or compare with an existing one, and return the digest.

    Raises:
        TrainingError: the folder holds a run with different settings; the message lists them.
    """
    record: dict[str, Any] = {
        "settings": config.to_table(settings),
        "data": training.facts,
        "teacher": teacher.facts() if teacher else None,
        "class_names": list(training.class_names),
        "parameters": counts,
        "files": methods.digests(settings.method),
    }
    digest = schema.digest({**record, "settings": _binding(record)})
    file = out / "settings.json"
    if file.exists():
        old = json.loads(file.read_text())
        if old.get("digest") != digest:
            changed = _changed(old, json.loads(json.dumps(record)))
            raise TrainingError(
                f"{out} holds a run with different settings: "
                f"{'; '.join(changed) or 'other classes'}. Name another --out "
                "folder, or delete this one.",
                code="other-run",
            )
    if write:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"digest": digest, **record}, indent=1) + "\n"
        checkpoint.write_atomically(file, lambda partial: partial.write_text(text))
    return digest


def _binding(record: dict[str, Any]) -> dict[str, Any]:
    """The settings that must not change when a run resumes."""
    free = {
        "threads", "replay", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints",
        "tensorboard",
    }  # fmt: skip
    return {key: value for key, value in record["settings"].items() if key not in free}


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences between two starts of a run, settings by their `--set` names."""
    lines = schema.differences(_binding(old), _binding(new))
    for name in ("teacher", "files"):
        lines += schema.differences({name: old.get(name)}, {name: new[name]})
    if old.get("data") != new["data"]:
        lines.append("different images, crops or labels")
    return lines


def _precision(settings: TrainSettings, device: torch.device) -> Precision:
    if settings.precision != "auto":
        return settings.precision
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return "bfloat16"
    return "float32"


def _scaler(settings: TrainSettings, device: torch.device) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, enabled=_precision(settings, device) == "float16")
