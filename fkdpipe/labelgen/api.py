"""Phase 1 as one call, for Python and for the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fkdpipe.common import distributed
from fkdpipe.common.errors import UsageError
from fkdpipe.common.progress import Reporter, silent
from fkdpipe.labelgen import dry_run, existing, plan
from fkdpipe.labelgen import generate as units
from fkdpipe.labelgen.dry_run import Forecast
from fkdpipe.labelgen.generate import Generated, Resources
from fkdpipe.labelgen.repair import Repaired, restore, withdraw
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks import teachers
from fkdpipe.networks.teachers import Network, Precision, Teacher
from fkdpipe.pixels import images as folders
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import begin
from fkdpipe.storage.location import open_location


def generate(
    images: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    teacher: Network | os.PathLike[str] | Sequence[Network | os.PathLike[str]],
    teacher_weight: Sequence[float] = (),
    form: str | None = None,
    features: Sequence[str] = (),
    features_code: Literal["float16", "int8"] = "float16",
    basis: Path | None = None,
    numbered: bool = False,
    crops: int | None = None,
    crop: CropDistribution | None = None,
    boxes: Literal["stored", "derived"] | None = None,
    seed: int | None = None,
    source: str = "",
    temperature: float = 1.0,
    precision: Precision = "float32",
    batch_size: int = 64,
    replay: Literal["auto", "cpu", "dali"] = "auto",
    threads: int | None = None,
    device: str | torch.device | None = None,
    part: str | None = None,
    reporter: Reporter = silent,
) -> Generated:
    """Label recorded crops of the images in a folder and write them to a store, as `fkdpipe
    generate` does.

    A second call generates only what is missing; under torchrun the processes share the work.
    Arguments that are left out are taken from an existing store, whose settings cannot be changed.

    Args:
        images: a folder of class/image, the same below train/, or images without classes.
        store: a folder, or a URL.
        teacher: a name as for `--teacher`, a module, or what `load_teacher` returns. Several are
            averaged as probabilities, with the relative weights teacher_weight.
        form: full, logits, topk:K, topk:K:compact, hard, or none for features only; by default
            topk:10, or all C classes if there are fewer.
        features: pre or post (penultimate vectors before or after the last activation), with :D
            for the leading D components of basis, a file from fkdpipe fit-basis, or map (the last
            map). features_code: how they are stored.
        numbered: class folders are named by output index; other names need a `Teacher` with a
            class map (`load_teacher`).
        crops: M, per image, in total. crop: their distribution. seed: of crops and order, default
            0.
        boxes: stored, or derived from the seed when they are read.
        source: name of the labels in the store, by default the teachers' names.
        temperature: of the teachers' softmax. precision: of those that are not `Teacher` objects.
        batch_size: crops per teacher batch. replay: backend that crops and resizes, in threads.
        device: of the teachers, by default a GPU if there is one.
        part: I/N, counted from 1: this process's share, without torchrun.

    Raises:
        UsageError: invalid arguments.
        ModelError: a teacher cannot be built, or its outputs are not the folder's classes.
        ImagesError: no usable images.
        StoreMismatchError: the store was made with other settings or weights; says which.

    Example:
        >>> generate("images", "store", teacher="resnet50", form="topk:10", crops=200)
    """
    networks = teachers.as_networks(teacher)
    settings = GenerateSettings(
        teacher=tuple(_name(network) for network in networks), teacher_weight=tuple(teacher_weight),
        form=form, features=tuple(features), features_code=features_code, basis=basis,
        numbered=numbered, crops=crops, crop=crop, boxes=boxes, seed=seed, source=source,
        temperature=temperature,
        precision=precision, batch_size=batch_size, replay=replay, threads=threads,
    )  # fmt: skip
    return run(images, store, settings, networks, device=device, part=part, reporter=reporter)


def run(
    data: str | os.PathLike[str],
    store: str | os.PathLike[str],
    settings: GenerateSettings,
    networks: Sequence[Network],
    *,
    device: str | torch.device | None = None,
    part: str | None = None,
    repair: bool = False,
    reporter: Reporter = silent,
) -> Generated:
    """`generate` with all settings in one object.

    Args:
        networks: those of `settings.teacher`, in its order.
        repair: find broken units and generate them again with the settings they record.

    Raises:
        As `generate`; StoreError if something cannot be repaired.
    """
    root, location = Path(data), open_location(os.fspath(store))
    resources = _resources(settings, device, part)
    if repair and resources.rank.world > 1:
        raise UsageError("--repair needs a single process: run it without --part and torchrun.")
    loaded = _load(root, settings, networks, resources.device)
    restored = restore(location, root) if repair else None
    work = plan.prepare(
        location, root, settings, loaded,
        device=resources.device, rank=resources.rank, reporter=reporter,
    )  # fmt: skip
    if restored is None:
        return units.generate(work, loaded, resources, reporter=reporter)
    withdrawn = withdraw(work, restored)
    resources = replace(resources, batch_of=withdrawn.batch_of)
    result = units.generate(work, loaded, resources, reporter=reporter)
    return replace(result, repaired=Repaired(restored.records, withdrawn.units, withdrawn.left))


def forecast(
    data: str | os.PathLike[str],
    store: str | os.PathLike[str],
    settings: GenerateSettings,
    networks: Sequence[Network],
    *,
    device: str | torch.device | None = None,
    part: str | None = None,
    reporter: Reporter = silent,
) -> Forecast:
    """Estimate what `run` takes, with a sample in a temporary folder; only reads the store."""
    root, location = Path(data), open_location(os.fspath(store))
    resources = _resources(settings, device, part)
    loaded = _load(root, settings, networks, resources.device)
    source = settings.source or plan.default_source(loaded)
    settings = existing.as_store(begin.find_store(location), settings, source)
    return dry_run.forecast(root, settings, loaded, resources, reporter=reporter)


def _resources(
    settings: GenerateSettings, device: str | torch.device | None, part: str | None
) -> Resources:
    rank = distributed.parse_part(part) if part else distributed.current()
    where = distributed.choose_device(device, rank.local)
    threads = settings.threads or distributed.default_threads()
    return Resources(where, settings.batch_size, threads, rank)


def _load(
    data: Path, settings: GenerateSettings, networks: Sequence[Network], device: torch.device
) -> list[Teacher]:
    named = settings.form != "none"  # features have no classes to match
    return teachers.load_teachers(
        networks,
        class_names=folders.class_folders(folders.split_root(data, "train")) if named else (),
        weights=settings.teacher_weight,
        class_maps=settings.class_map,
        numbered=settings.numbered,
        precision=settings.precision,
        device=device,
        needs=settings.needs,
    )


def _name(network: Network) -> str:
    if isinstance(network, nn.Module):
        return type(network).__name__
    return str(network.spec if isinstance(network, Teacher) else network)
