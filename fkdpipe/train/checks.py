"""Checks before a run is built: incompatible settings and unusable output folders."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from fkdpipe.common import disk, words
from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import UsageError
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage.labels import served_targets
from fkdpipe.storage.store import Store
from fkdpipe.train import parallel
from fkdpipe.train.feed import check_batch
from fkdpipe.train.methods.interface import MethodNeeds
from fkdpipe.train.settings import TrainSettings

log = logging.getLogger(__name__)

FEW_STEPS = 100  # with fewer, even fine-tuning hardly moves


def check_out(out: Path, data: Path) -> None:
    """Refuse a run folder that is a file, or that lies inside the image folder or a store.

    Raises:
        UsageError: the folder cannot be used; says why.
    """
    disk.local_path(out)
    existing = next((path for path in (out, *out.parents) if path.exists()), out)
    if existing.exists() and not existing.is_dir():
        raise UsageError(f"{existing} is a file; --out names a folder.")
    path = out.resolve()
    if data.resolve() in (path, *path.parents):
        raise UsageError(f"--out {out} is inside the image folder {data}; name another folder.")
    for parent in (path, *path.parents):
        if (parent / "commits").is_dir() and (parent / "zarr.json").is_file():
            raise UsageError(f"--out {out} is inside the store {parent}; name another folder.")


def target(settings: TrainSettings, needs: MethodNeeds, store: Store | None) -> str:
    """The training target; required where a store's labels would otherwise be ignored.

    Raises:
        UsageError: no target is named, and the store's labels are the only teacher.
    """
    if settings.target is not None:
        return settings.target
    has_teacher_terms = needs.teacher is not None or needs.soft is not None
    if store is not None and not has_teacher_terms:
        forms = {p.settings.form for p in store.parts.values() if p.kind == "labels"}
        served = sorted({t for form in forms for t in served_targets(form)})
        raise UsageError(
            f"name the training target: --target with one of {', '.join(served)}, which "
            f"{store.url} serves, or ground-truth, which ignores its labels."
        )
    return "ground-truth"


def check(
    settings: TrainSettings,
    needs: MethodNeeds,
    store: Store | None,
    rank: Rank,
    device: torch.device,
) -> None:
    """Refuse invalid settings before anything is opened.

    Raises:
        UsageError: settings that conflict with each other or with the machine.
    """
    parallel.check(settings, device)
    _check_store(settings, store)
    _check_batch(settings, needs, rank)
    _check_teacher(settings, needs)
    _check_knowledge(settings, needs, store)
    if settings.train_only == "classifier" and not needs.classifier:
        raise UsageError(
            f"method {_name(settings)} does not train the classifier, but train_only = classifier "
            "trains nothing else."
        )


def warn_of_few_steps(steps: int, images: int, settings: TrainSettings) -> None:
    """Warn about a run that is too short to learn much."""
    if steps < FEW_STEPS:
        log.warning(
            "the run has only %s (%s of %s, batch size %d); a network needs hundreds. "
            "Raise --epochs or lower --batch-size; recipes/finetune-small.toml is for "
            "small sets.",
            words.count(steps, "step"),
            words.count(settings.epochs, "epoch"),
            words.count(images, "image"),
            settings.batch_size,
        )


def _check_store(settings: TrainSettings, store: Store | None) -> None:
    target = settings.parsed_target
    if store is None and target.kind != "ground-truth":
        raise UsageError(
            f"target {target} needs a store of labels: fkdpipe train DATA STORE --target {target}. "
            "Only --target ground-truth trains without one."
        )
    if store is not None and settings.crop != CropDistribution():
        log.warning("crop.* is ignored: it applies to training without a store")


def _check_batch(settings: TrainSettings, needs: MethodNeeds, rank: Rank) -> None:
    block = settings.mixing.block if settings.mixing.on else 1
    check_batch(settings.batch_size, settings.crops_per_image, rank.world, block)
    local_batch = settings.batch_size // (rank.world * settings.accumulate)
    if local_batch < needs.least:
        raise UsageError(
            f"method {_name(settings)} takes statistics over the crops of one forward pass "
            f"and needs at least {needs.least}: batch size {settings.batch_size} over {rank.world} "
            f"processes and {settings.accumulate} accumulation steps leaves {local_batch}. Raise "
            "--batch-size."
        )


def _check_teacher(settings: TrainSettings, needs: MethodNeeds) -> None:
    """Require a live teacher where the method needs one, and refuse one that would be unused."""
    if settings.teacher is None:
        if needs.live:
            raise UsageError(f"method {_name(settings)} needs a live teacher: --teacher NAME=FILE.")
        return
    used = needs.live if needs.stored else needs.teacher is not None or needs.soft is not None
    if not used:
        raise UsageError(f"method {_name(settings)} does not use --teacher {settings.teacher}.")


def _check_knowledge(settings: TrainSettings, needs: MethodNeeds, store: Store | None) -> None:
    """Require a source for the teacher's outputs: a live teacher or the store."""
    live = settings.teacher is not None and not needs.stored
    if settings.mixing.on and not needs.mixing:
        raise UsageError(
            f"method {_name(settings)} cannot mix images: the teacher's features of a mixed image "
            "are not the mix of its features of each. Leave mixup and cutmix out."
        )
    if settings.mixing.on and needs.teacher is not None and not live:
        raise UsageError("stored features are of unmixed images; leave mixup and cutmix out.")
    if live:
        return
    instead = "." if needs.stored else ", or --teacher NAME=FILE."
    if needs.teacher is not None and store is None:
        raise UsageError(
            f"method {_name(settings)} needs the teacher's features: a STORE made with "
            f"--features{instead}"
        )
    if needs.soft is not None and settings.parsed_target.kind == "ground-truth":
        raise UsageError(
            f"method {_name(settings)} needs the teacher's probabilities: a STORE and a --target "
            f"other than ground-truth{instead}"
        )


def _name(settings: TrainSettings) -> str:
    return str(settings.method.get("name", "fkd"))
