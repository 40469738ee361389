"""Fit the basis of a teacher's features, in one streaming pass over crops.

Sums and second moments are accumulated in float64, so memory does not grow with the number of
images. Without a store, the crops are those that `generate` draws with the same distribution and
seed; otherwise those of the store. Several processes (torchrun) each sum their own batches and add
up at the end; their basis agrees with that of one process up to float64 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import distributed as dist

from fkdpipe.common import config
from fkdpipe.common.config import Seed, Share
from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import ImagesError, StoreMismatchError, UsageError
from fkdpipe.common.progress import Advance, Reporter, silent
from fkdpipe.labelgen import outputs
from fkdpipe.labelgen.generate import Resources
from fkdpipe.networks import feature_layers, features
from fkdpipe.networks.feature_layers import Needs
from fkdpipe.networks.features import Basis, FeatureLayer
from fkdpipe.networks.teachers import Precision, Teacher
from fkdpipe.pixels import crops, images, replay
from fkdpipe.pixels.crops import CropDistribution, Crops
from fkdpipe.pixels.replay import Backend, Request
from fkdpipe.storage import rounds, writer
from fkdpipe.storage.settings import CropsSettings
from fkdpipe.storage.store import Store

MAX_FAILED_SHARE = 0.5  # of the images: more looks like the wrong folder


@config.settings
class FitSettings:
    """What a basis is fitted on."""

    teacher: str
    """NAME or NAME=FILE."""
    fraction: Share = 0.1
    """Share of the images of every class, chosen by the seed."""
    layer: FeatureLayer = "pre"
    """Features before or after the last activation."""
    crops: PositiveInt = 1
    """M, crops of each image."""
    crop: CropDistribution = field(default_factory=CropDistribution)
    """The distribution the crops are drawn from, without a store."""
    seed: Seed = 0
    """Seed for sampling images and crops."""
    precision: Precision = "float32"
    """Precision of the teacher's forward pass."""
    batch_size: PositiveInt = 64
    """Crops per teacher batch."""
    replay: Literal["auto", "cpu", "dali"] = "auto"
    """Backend that turns recorded crops into pixels."""
    threads: PositiveInt | None = None
    """Threads of the replay; by default the machine's cores."""

    @property
    def needs(self) -> Needs:
        return Needs(pre=self.layer == "pre", penultimate=self.layer == "post")


@dataclass(frozen=True)
class Sample:
    """Crops to fit on. N images, M crops of each.

    Attributes:
        root: folder that keys are relative to. facts: how they were chosen, recorded in the basis.
    """

    root: Path
    keys: np.ndarray
    size_N2: np.ndarray
    crops: Crops
    facts: dict[str, Any]


@dataclass(frozen=True)
class Fitted:
    """A basis and its number of images. failed: images left out, by key, with the reason."""

    basis: Basis
    images: int
    failed: dict[str, str]


def from_folder(data: Path, settings: FitSettings, reporter: Reporter = silent) -> Sample:
    """A fraction of a folder, with or without classes, on the crops that `generate` will draw.

    Raises:
        ImagesError: no usable images.
    """
    with reporter.task("scan", 0, "files") as advance:
        folder = images.scan(data, need_classes=False, on_image=advance)
    ids = crops.image_ids(folder.keys)
    rows = _choose(ids, folder.class_N, settings)
    sample = crops.sample(
        settings.crop,
        seed=settings.seed,
        image_id_N=ids[rows],
        size_N2=folder.size_N2[rows],
        crops_M=np.arange(settings.crops),
    )
    distribution = CropsSettings.of(settings.crop, seed=settings.seed, count=settings.crops)
    return _sample(
        folder.root, np.array(folder.keys, dtype=object)[rows], folder.size_N2[rows], sample,
        settings, distribution.to_json(), folder.fingerprint,
    )  # fmt: skip


def from_store(store: Store, data: Path, settings: FitSettings) -> Sample:
    """A fraction of a store's images, on the first crops of its first round.

    Raises:
        StoreMismatchError: it has fewer crops.
    """
    (first, *_) = store.rounds()
    if settings.crops > first.settings.crops:
        raise StoreMismatchError(
            f"the first round of {store.url} has {first.settings.crops} crops per image, not the "
            f"requested {settings.crops}.",
            code="settings",
        )
    listed = store.images
    rows = _choose(crops.image_ids(list(listed.keys)), listed.class_N, settings)
    shape = (len(rows), settings.crops)
    values = {
        field.name: np.empty((*shape, *field.shape), dtype=field.dtype)
        for field in rounds.fields_of(first.settings)
    }
    for unit in np.unique(rows // store.unit_size).tolist():
        of_unit = rounds.values_of(rounds.crops_of(store, first, unit))
        here = np.flatnonzero(rows // store.unit_size == unit)
        for name, array in values.items():
            array[here] = of_unit[name][rows[here] % store.unit_size, : settings.crops]
    return _sample(
        images.split_root(data, "train"), listed.keys[rows], listed.size_N2[rows],
        rounds.of_values(values), settings, first.settings.to_json(),
        str(store.facts["fingerprint"]),
    )  # fmt: skip


def _choose(ids: np.ndarray, class_N: np.ndarray, settings: FitSettings) -> np.ndarray:
    order = crops.random_order(settings.seed, ids)
    return crops.per_class(class_N, order, settings.fraction)


def _sample(
    root: Path,
    keys: np.ndarray,
    size_N2: np.ndarray,
    recorded: Crops,
    settings: FitSettings,
    distribution: dict[str, Any],
    fingerprint: str,
) -> Sample:
    facts = {
        "images": f"{100 * settings.fraction:g}%",
        "crops": distribution,
        "fingerprint": fingerprint,
    }
    return Sample(root, keys, size_N2, recorded, facts)


def fit(
    sample: Sample,
    teacher: Teacher,
    settings: FitSettings,
    resources: Resources,
    *,
    components: int | None = None,
    reporter: Reporter = silent,
) -> Fitted:
    """The basis of a teacher's features on a sample, the same on every process.

    Args:
        components: how many are needed. Too few crops are found before the work, and features of
            smaller rank after twice as many vectors.

    Raises:
        UsageError: fewer than two feature vectors, or fewer components than are needed.
        ImagesError: most images cannot be read.
    """
    backend = replay.choose_backend(settings.replay, resources.device, _request(sample, 0, 8))
    sums = _Sums.zeros(feature_layers.width(teacher.module.network))
    if components is not None and components > len(sums.sum_D):
        raise UsageError(
            f"{components} components were requested of features of width {len(sums.sum_D)}; use "
            "that many or fewer, or for a wider student method.alignment=conv-pre."
        )
    if components is not None and components >= sample.crops.flip_NM.size:
        raise UsageError(
            f"{components} components need more than {components} crops; the sample has "
            f"{sample.crops.flip_NM.size}. Raise --fraction or --crops, or use fewer components."
        )
    probe = 2 * components if components is not None else None
    failed: dict[str, str] = {}
    per_rank = -(-sample.crops.flip_NM.size // resources.rank.world)
    with reporter.task("teacher", per_rank, "crops") as advance:
        for vectors_BD in _vectors(sample, teacher, settings, resources, backend, failed, advance):
            sums.add(vectors_BD)
            if components is not None and probe is not None and sums.count >= probe:
                sums.basis({}).check_components(components)
                probe = None
    failed = _add_up(sums, failed, resources.rank)
    if len(failed) > MAX_FAILED_SHARE * len(sample.keys):
        key, why = next(iter(failed.items()))
        raise ImagesError(
            f"{len(failed)} of {len(sample.keys)} images cannot be used, for example {key}: {why}. "
            f"Check that {sample.root} is the right folder.",
            code="wrong-folder",
        )
    facts = {
        **sample.facts,
        "teacher": teacher.facts(),
        "tap": settings.layer,
        "precision": teacher.precision,
        "seed": settings.seed,
        "replay": replay.versions(backend),
        "packages": writer.package_versions(),
    }
    return Fitted(sums.basis(facts), len(sample.keys) - len(failed), failed)


@dataclass
class _Sums:
    """Float64 sums over the vectors so far: (), (D,) and (D, D)."""

    count: torch.Tensor
    sum_D: torch.Tensor
    product_DD: torch.Tensor

    @classmethod
    def zeros(cls, width: int) -> _Sums:
        return cls(
            *(torch.zeros(shape, dtype=torch.float64) for shape in ((), width, (width,) * 2))
        )

    def basis(self, facts: dict[str, Any]) -> Basis:
        return features.fit(int(self.count), self.sum_D.numpy(), self.product_DD.numpy(), facts)

    def add(self, vectors_BD: torch.Tensor) -> None:
        x_BD = vectors_BD.double()
        self.count += len(x_BD)
        self.sum_D += x_BD.sum(0).cpu()
        self.product_DD += (x_BD.T @ x_BD).cpu()


def _vectors(
    sample: Sample,
    teacher: Teacher,
    settings: FitSettings,
    resources: Resources,
    backend: Backend,
    failed: dict[str, str],
    advance: Advance,
) -> Iterator[torch.Tensor]:
    """(B, D) features of every world-th batch; adds images that fail to `failed`."""
    step = max(1, resources.batch // sample.crops.flip_NM.shape[1])
    rank = resources.rank
    firsts = range(rank.index * step, len(sample.keys), rank.world * step)
    (view,) = views = outputs.views_of([teacher])
    with replay.open_replay(
        backend, views, threads=resources.threads, device=resources.device
    ) as replayer:
        for pixels in replayer.run(_request(sample, first, step) for first in firsts):
            replay.refuse_passing(pixels)
            rows: np.ndarray = pixels.request.tag  # type: ignore[assignment]
            for f in pixels.failures:
                failed[str(sample.keys[rows[f.image]])] = f"{f.code}: {f.detail}"
            good = np.setdiff1d(np.arange(len(rows)), [f.image for f in pixels.failures])
            if len(good):
                crops_M = pixels.request.flip_Im.shape[1]
                within = (good[:, None] * crops_M + np.arange(crops_M)).ravel()
                seen = pixels.views[0]
                seen = seen if len(good) == len(rows) else seen[torch.from_numpy(within)]
                factors = outputs.factors(sample.crops, rows[0] * crops_M + within)
                (out,) = outputs.teach([teacher], {view: seen.to(resources.device)}, factors)
                vectors_BD = out.pre if settings.layer == "pre" else out.penultimate
                assert vectors_BD is not None
                yield vectors_BD
            advance(pixels.request.flip_Im.size)


def _request(sample: Sample, first: int, count: int) -> Request:
    rows = np.arange(first, min(first + count, len(sample.keys)))
    return Request.of(
        sample.root, sample.keys[rows], sample.size_N2[rows], sample.crops[rows], tag=rows
    )


def _add_up(sums: _Sums, failed: dict[str, str], rank: Rank) -> dict[str, str]:
    """Add up the sums of all processes in place; returns the failed images of all."""
    if rank.world == 1:
        return failed
    dist.init_process_group("gloo", rank=rank.index, world_size=rank.world)
    for value in (sums.count, sums.sum_D, sums.product_DD):
        dist.all_reduce(value)
    gathered: list[dict[str, str]] = [{} for _ in range(rank.world)]
    dist.all_gather_object(gathered, failed)
    dist.destroy_process_group()
    return {key: why for part in gathered for key, why in part.items()}
