"""What can be refused before a run is built: settings that do not go together, wrong places."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

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


def check_place(out: Path, data: Path) -> None:
    """Refuse a run folder that is a file, or inside what others read.

    Raises:
        UsageError: saying where it lies.
    """
    there = next((above for above in (out, *out.parents) if above.exists()), out)
    if there.exists() and not there.is_dir():
        raise UsageError(f"{there} is a file; --out names a folder.")
    place = out.resolve()
    if data.resolve() in (place, *place.parents):
        raise UsageError(f"--out {out} is inside the image folder {data}; name another place.")
    for above in (place, *place.parents):
        if (above / "commits").is_dir() and (above / "zarr.json").is_file():
            raise UsageError(f"--out {out} is inside the store {above}; name another place.")


def target(settings: TrainSettings, needs: MethodNeeds, store: Store | None) -> str:
    """What is learnt; nobody who names a store trains without its labels by forgetting --target.

    Raises:
        UsageError: no target is named, and the store's labels are all there is to teach with.
    """
    if settings.target is not None:
        return settings.target
    taught = needs.teacher is not None or needs.soft is not None
    if store is not None and not taught:
        forms = {p.settings.form for p in store.parts.values() if p.kind == "labels"}
        served = sorted({t for form in forms for t in served_targets(form)})
        raise UsageError(
            f"name what the student learns: --target with one of {', '.join(served)}, which "
            f"{store.url} serves, or ground-truth, which leaves its labels out."
        )
    return "ground-truth"


def check(
    settings: TrainSettings,
    needs: MethodNeeds,
    store: Store | None,
    rank: Rank,
    device: torch.device,
) -> None:
    """Refuse what cannot work before anything is opened.

    Raises:
        UsageError: settings that do not go together, or with the machine.
    """
    parallel.check(settings, device)
    _check_store(settings, store)
    _check_batch(settings, needs, rank)
    _check_teacher(settings, needs)
    _check_knowledge(settings, needs, store)
    if settings.train_only == "classifier" and not needs.classifier:
        raise UsageError(
            f"method {_name(settings)} does not train the classifier, and train_only classifier "
            "trains nothing else."
        )


def _check_store(settings: TrainSettings, store: Store | None) -> None:
    target = settings.parsed_target
    if store is None and target.kind != "ground-truth":
        raise UsageError(
            f"target {target} needs a store of labels: fkdpipe train DATA STORE --target {target}. "
            "Only --target ground-truth trains without one."
        )
    if store is not None and settings.crop != CropDistribution():
        log.warning("crop.* is for training without a store; this store's crops are recorded")


def _check_batch(settings: TrainSettings, needs: MethodNeeds, rank: Rank) -> None:
    block = settings.mixing.block if settings.mixing.on else 1
    check_batch(settings.batch_size, settings.crops_per_image, rank.world, block)
    at_once = settings.batch_size // (rank.world * settings.accumulate)
    if at_once < needs.least:
        raise UsageError(
            f"method {_name(settings)} takes statistics over the crops that a process sees at "
            f"once, at least {needs.least}: batch size {settings.batch_size} over {rank.world} "
            f"processes and {settings.accumulate} accumulated parts leaves {at_once}. Raise "
            "--batch-size."
        )


def _check_teacher(settings: TrainSettings, needs: MethodNeeds) -> None:
    """A live teacher where the method asks for one, and none where nothing would ask it."""
    if settings.teacher is None:
        if needs.live:
            raise UsageError(f"method {_name(settings)} needs a live teacher: --teacher NAME=FILE.")
        return
    asked = needs.live if needs.stored else needs.teacher is not None or needs.soft is not None
    if not asked:
        raise UsageError(f"method {_name(settings)} has no use for --teacher {settings.teacher}.")


def _check_knowledge(settings: TrainSettings, needs: MethodNeeds, store: Store | None) -> None:
    """What the method learns from must come from somewhere: a live teacher, or the store."""
    live = settings.teacher is not None and not needs.stored
    if settings.mixing.on and not needs.mixing:
        raise UsageError(
            f"method {_name(settings)} cannot mix images: what the teacher says of a mixed image "
            "is no mix of what it says of each."
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
