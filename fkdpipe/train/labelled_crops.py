"""Recorded crops and their labels as batches on the device: what a training loop iterates over."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from fkdpipe.common.distributed import Rank, choose_device, current, default_threads
from fkdpipe.common.errors import StoreMismatchError, UsageError
from fkdpipe.networks.preprocessing import Preprocessing, sides
from fkdpipe.pixels import colour, replay
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.pixels.replay import Backend, BackendChoice, Request, View, normalise
from fkdpipe.storage import cache, schema
from fkdpipe.storage.labels import Target, parse_target
from fkdpipe.storage.store import Store, open_store
from fkdpipe.train import data, stored
from fkdpipe.train.batch import Batch, HostBatch
from fkdpipe.train.data import TrainingSet
from fkdpipe.train.feed import Feed, check_batch
from fkdpipe.train.order import Order
from fkdpipe.train.schedule import Pass, Stage

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WINDOW_UNITS = 8  # units of images that are shuffled together
_ENDLESS = 2**40  # passes

log = logging.getLogger(__name__)


class LabelledCrops(IterableDataset[Batch]):
    """Batches of recorded crops with their stored labels, an epoch at a time.

    An epoch is one pass over the images, with the next `crops_per_image` crops of each. Every
    batch is full: the last one of an epoch goes on with images of the next, and iterating again
    goes on after it (also after an epoch that was broken off: `set_epoch` begins one again). Order
    and batches depend on the seed alone, not on the number of processes.

    Images are decoded and resized in threads, and read ahead: iterate over it directly, or with
    `DataLoader(crops, batch_size=None)`, without worker processes.

    Args:
        store: path or URL, or an opened store. None: fresh random crops and the folder's classes
            (target `ground-truth`).
        images: the image folder that the store was made for.
        target: what to learn, for example `"marginal-smoothing:5"`; see `Target`.
        size: of the crops' pixels, one side or (height, width).
        batch_size: B in crops, over all processes; a multiple of crops_per_image x world_size.
        crops_per_image: m, crops of an image in a batch: it is decoded once for them.
        source: which labels, where a store has several.
        temperature: of the labels; None as stored. Needs form `logits`, or `full` of one teacher.
        features: stored features wanted beside the labels: `"pre"`, `"post"` or `"map"`.
        crops: use only the first so many crops of each image.
        independent: no two crops of an image in one batch; they are spread over m batches.
        interpolation: of the resize, antialiased. mean, std: per channel, of pixels in 0 to 1.
        normalize: False gives uint8 pixels.
        seed: of the order (and of fresh crops).
        device: where batches are delivered; None takes the GPU of this process, or the CPU.
        rank, world_size: of this process; None takes torchrun's.
        replay: `"cpu"`, `"dali"` or `"auto"`. threads: of the replay; None shares out the cores.
        cache: local folder for labels; None takes temporary space.
        allow_partial: use the finished part of a store that is still being made.

    Raises:
        UsageError: arguments that cannot be right, worker processes.
        ImagesError: no such folder, or nothing usable in it.
        StoreError: no such store or source, not finished, damaged.
        StoreMismatchError: a store of other images, or one that cannot serve the target.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | Store | None,
        images: str | os.PathLike[str],
        *,
        target: str | Target,
        size: int | tuple[int, int],
        batch_size: int,
        crops_per_image: int = 1,
        source: str | None = None,
        temperature: float | None = None,
        features: Literal["pre", "post", "map"] | None = None,
        crops: int | None = None,
        independent: bool = False,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        normalize: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        replay: BackendChoice = "auto",
        threads: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        allow_partial: bool = False,
    ) -> None:
        here = _rank(rank, world_size)
        where = choose_device(device, here.local)
        target = target if isinstance(target, Target) else parse_target(str(target))
        batch_size, crops_per_image = _whole(batch_size=batch_size, crops_per_image=crops_per_image)
        (seed,) = _whole(least=0, seed=seed)
        (threads,) = _whole(threads=default_threads() if threads is None else threads)
        check_batch(batch_size, crops_per_image, here.world)
        preprocessing = Preprocessing(sides(size), interpolation, mean, std)
        opened = open_store(store) if isinstance(store, (str, os.PathLike)) else store
        training = _open(
            opened, Path(images), target, source, temperature, features, seed, cache, allow_partial,
        )  # fmt: skip
        training = _first(training, crops)
        data.check_crops(training, crops_per_image)
        order = Order(
            training.rows,
            unit_size=training.unit_size,
            window=WINDOW_UNITS,
            stages=[Stage(Pass(0, 0, crops_per_image, 0), _ENDLESS)],
            batch_size=batch_size,
            seed=seed,
            independent=independent,
        )
        feed = Feed(
            training,
            order,
            [View.of(preprocessing)],
            backend=choose_backend(replay, training, opened, where),
            threads=threads,
            device=where,
            rank=here,
        )
        self._wire(feed, [preprocessing], normalize)
        self._facts: dict[str, Any] = {
            "labels": schema.digest(training.facts)[:16],
            "images": len(training.rows),
            "crops": training.crops_per_image,
            "batch_size": batch_size,
            "crops_per_image": crops_per_image,
            "independent": independent,
            "seed": seed,
            "target": str(target),
        }

    @classmethod
    def of(cls, feed: Feed, preprocessing: Sequence[Preprocessing]) -> Self:
        """Batches of a feed that is wired already, as the trainer does it.

        Args:
            preprocessing: the student's and, where one runs beside it, the live teacher's; the
                views of the feed are theirs.
        """
        self = cls.__new__(cls)
        self._wire(feed, preprocessing, normalize=True)
        self._facts = {}
        return self

    def _wire(self, feed: Feed, preprocessing: Sequence[Preprocessing], normalize: bool) -> None:
        self.feed = feed
        self._inputs = [(feed.views.index(View.of(p)), p) for p in preprocessing]
        self._normalize = normalize
        self._position = 0  # the step that comes next
        self._resumed = False
        self._running: Generator[Batch] | None = None
        self._running_at = 0

    @property
    def device(self) -> torch.device:
        """Where batches are delivered."""
        return self.feed.device

    @property
    def num_classes(self) -> int:
        """C, the width of the labels."""
        labels = self.feed.data.labels
        return labels.classes if labels is not None else max(1, len(self.class_names))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the image folder, in order of class."""
        return self.feed.data.class_names

    @property
    def keys(self) -> np.ndarray:
        """Names of all images (N,), in the order that `Batch.rows` counts."""
        return self.feed.data.keys

    @property
    def failed(self) -> dict[str, str]:
        """Images that could not be read so far, and why; others stood in for them."""
        return dict(self.feed.failed)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.feed.order.pass_of(self._position)

    def __len__(self) -> int:
        """Batches of the epoch. Of two epochs one may have one more: batches are never short."""
        epoch, order = self.epoch, self.feed.order
        return order.first_step(epoch + 1) - order.first_step(epoch)

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise UsageError(
                "LabelledCrops decodes in threads of its own: give DataLoader num_workers=0."
            )
        order, epoch = self.feed.order, self.epoch
        if not self._resumed and self._position > order.first_step(epoch):
            epoch += 1  # this one was broken off: frameworks take the same number of every epoch
            self._position = order.first_step(epoch)
        start, self._resumed = self._position, False
        for step in range(start, order.first_step(epoch + 1)):
            batch = self._take(step)
            self._position = step + 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Begin with this epoch. Not needed in a plain loop: each epoch is followed by the next."""
        if epoch < 0:
            raise UsageError(f"an epoch is a number from 0 on; found {epoch}.")
        if not (self._resumed and epoch == self.epoch):
            self._position, self._resumed = self.feed.order.first_step(epoch), False

    def state_dict(self) -> dict[str, Any]:
        """Where iterating stands, in a few numbers; the same in every process."""
        return {"step": self._position, **self._facts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch of a saved state, also with another number of processes.

        Raises:
            StoreMismatchError: the state is of other data or settings; says which.
        """
        step = state.get("step") if isinstance(state, Mapping) else None
        if not isinstance(step, int) or step < 0:
            raise UsageError(f"this is not a state of LabelledCrops: {state!r}.")
        differs = schema.differences(
            {key: value for key, value in state.items() if key != "step"}, self._facts
        )
        if differs:
            raise StoreMismatchError(
                f"the saved state is of other batches: {'; '.join(differs)}. Give the same "
                "store, target, batch size and seed, or begin without it.",
                code="other-state",
            )
        self._position, self._resumed = step, True

    def stream(self, start: int = 0) -> Generator[Batch]:
        """Batches from step `start` on, epoch after epoch."""
        for batch in self.feed.stream(start):
            yield self._on_device(batch)

    def close(self) -> None:
        """End the threads that read ahead."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _take(self, step: int) -> Batch:
        """The batch of a step, from the stream that is running where it stands there."""
        if self._running is None or self._running_at != step:
            self.close()
            self._running = self.stream(step)
        batch = next(self._running)
        self._running_at = step + 1
        return batch

    def _on_device(self, host: HostBatch) -> Batch:
        device, values = self.feed.device, host.values
        sent = {
            name: torch.from_numpy(array).to(device, non_blocking=True)
            for name, array in values.items()
            if name not in ("row", "crop", "jitter")
        }
        rows = values["row"]
        class_B = torch.from_numpy(self.feed.data.class_N[rows]).long()
        classes = class_B.to(device, non_blocking=True)
        factors = torch.from_numpy(values["jitter"]) if "jitter" in values else None
        seen = {
            index: colour.jitter(host.views[index].to(device, non_blocking=True), factors)
            for index, _ in self._inputs
        }
        pixels = [self._normalised(seen[index], p) for index, p in self._inputs]
        return Batch(
            pixels=pixels[0],
            labels=self._labels(sent, classes, host.total),
            classes=classes,
            rows=torch.from_numpy(rows),
            crops=torch.from_numpy(values["crop"]),
            keys=tuple(self.keys[rows].tolist()),
            features=sent.get("features"),
            teacher_pixels=pixels[1] if len(pixels) > 1 else None,
            step=host.step,
            epoch=host.passed.index,
            total=host.total,
            passed=host.passed,
            m=host.m,
            first_image=host.first_image,
        )

    def _labels(
        self, values: dict[str, torch.Tensor], class_B: torch.Tensor, total: int
    ) -> torch.Tensor:
        labels = self.feed.data.labels
        if labels is None:
            dense_BC = stored.one_hot(class_B, self.num_classes)
        else:
            dense_BC = labels.dense(values)
        return dense_BC if total else dense_BC.zero_()

    def _normalised(self, pixels: torch.Tensor, p: Preprocessing) -> torch.Tensor:
        return normalise(pixels, p.mean, p.std) if self._normalize else pixels


def _whole(least: int = 1, **values: Any) -> list[int]:
    """Whole numbers as Python's own, so that a state can be saved whatever they came from."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}; found {value!r}.")
    return [int(value) for value in values.values()]


def _first(training: TrainingSet, crops: int | None) -> TrainingSet:
    """The first so many crops of each image."""
    if crops is None or training.crops_per_image is None:
        return training
    (count,) = _whole(crops=crops)
    return replace(training, crops_per_image=min(count, training.crops_per_image))


def _rank(rank: int | None, world_size: int | None) -> Rank:
    here = current()
    if rank is None and world_size is None:
        return here
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise UsageError(
            f"rank and world_size go together, with 0 <= rank < world_size; found {rank} of "
            f"{world_size}."
        )
    return Rank(rank, world_size, here.local)


def _open(
    store: Store | None,
    images: Path,
    target: Target,
    source: str | None,
    temperature: float | None,
    features: Literal["pre", "post", "map"] | None,
    seed: int,
    cache_dir: str | os.PathLike[str] | None,
    allow_partial: bool,
) -> TrainingSet:
    if store is not None:
        if target.kind == "ground-truth" and not store.images.class_names:
            raise UsageError(f"{store.url} has no classes, so ground-truth is unknown.")
        return data.from_store(
            store,
            images,
            target=target,
            source=source,
            temperature=temperature,
            features=features,
            cache_dir=Path(cache_dir) if cache_dir else cache.default_cache_dir(),
            allow_partial=allow_partial,
        )
    if target.kind != "ground-truth" or features is not None:
        raise UsageError(
            f"target {target} needs a store; without one, only ground-truth can be learnt."
        )
    return data.from_folder(images, distribution=CropDistribution(), seed=seed)


def choose_backend(
    choice: BackendChoice, training: TrainingSet, store: Store | None, device: torch.device
) -> Backend:
    """The replay for some training data; says so when the labels were made with another."""
    rows = training.rows[: min(8, len(training.rows))]
    drawn = training.crops(rows, np.arange(min(2, training.crops_per_image or 2)))
    sample = Request.of(training.root, training.keys[rows], training.size_N2[rows], drawn)
    backend = replay.choose_backend(choice, device, sample)
    recorded = {
        part.settings.replay
        for part in (store.parts.values() if store else [])
        if part.kind == "labels" and part.settings.replay  # unknown of imported labels
    }
    if recorded and backend not in recorded:
        log.warning(
            "the labels were made with the %s replay and training takes %s: pixels differ slightly",
            ", ".join(sorted(recorded)),
            backend,
        )
    return backend
