"""A batch: in the memory of the host as it is read, and on the device as a loop gets it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from fkdpipe.train.schedule import Pass
from fkdpipe.train.stored import Values

T = TypeVar("T")


@dataclass(frozen=True)
class HostBatch:
    """One process's share of a step. B = its crops, image-major (m of an image side by side).

    Attributes:
        step: number of the optimiser step. passed: the pass it begins in.
        m: crops of each image in this batch; 1 when they are spread over batches.
        first_image: position of its first image among the images of the whole step.
        total: crops of the step over all processes; 0 for a share that has no weight.
        views: uint8 (B, 3, H, W), channels-last, not normalised, one for each view of the feed.
        values: arrays of B rows: `row` and `crop` (which image of the list, which of its crops),
            `jitter` where recorded, `features` where asked for, and those of the labels.
    """

    step: int
    passed: Pass
    m: int
    first_image: int
    total: int
    views: tuple[torch.Tensor, ...]
    values: Values


@dataclass(frozen=True)
class Batch:
    """One process's share of a step: B crops, the crops of an image side by side.

    Attributes:
        pixels: float32 (B, 3, H, W), normalised, channels-last; uint8 where `normalize=False`.
        labels: float32 (B, C), the probabilities to learn. Rows sum to 1; rows of zeros where
            nothing is known, and where none of the share's images could be read.
        classes: int64 (B,), the folder's class of each crop; -1 in a folder without classes.
        rows, crops: int64 (B,) on the CPU: which image of `LabelledCrops.keys` each crop is of,
            and which of its recorded crops it is.
        keys: B names of images, relative paths.
        features: float32 (B, ...) stored features of the crops, None when not asked for.
        teacher_pixels: the crops as a live teacher wants them; None without one.
        step: number of the batch since the start of training. epoch: passes done before it.
        total: crops of the step over all processes; 0 when this share is to have no weight.
        passed, m, first_image: the pass it begins in, crops of each image in this batch, position
            of its first image among those of the whole step.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: torch.Tensor
    rows: torch.Tensor
    crops: torch.Tensor
    keys: tuple[str, ...]
    features: torch.Tensor | None
    teacher_pixels: torch.Tensor | None
    step: int
    epoch: int
    total: int
    passed: Pass
    m: int
    first_image: int

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on another device; `rows` and `crops` stay."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            pixels=move(self.pixels),
            labels=move(self.labels),
            classes=move(self.classes),
            features=None if self.features is None else move(self.features),
            teacher_pixels=None if self.teacher_pixels is None else move(self.teacher_pixels),
        )


def select(batch: HostBatch, rows_B: np.ndarray) -> HostBatch:
    """Other crops of the batch in the positions of its own."""
    return replace(
        batch,
        views=tuple(view[torch.from_numpy(rows_B)] for view in batch.views),
        values={name: array[rows_B] for name, array in batch.values.items()},
    )


def one_crop_each(whole: HostBatch) -> Iterator[HostBatch]:
    """m batches of one crop of each image: crop k of every image is in batch k.

    Pixels are copied, so that each batch lies in one piece on its way to the device.
    """
    for k in range(whole.m):
        every = slice(k, None, whole.m)
        yield replace(
            whole,
            step=whole.step + k,
            m=1,
            total=whole.total // whole.m,
            views=tuple(
                v[every].contiguous(memory_format=torch.channels_last) for v in whole.views
            ),
            values={name: array[every] for name, array in whole.values.items()},
        )


def with_next(items: Iterator[T]) -> Iterator[tuple[T, T | None]]:
    """Each item with the one after it, which is begun meanwhile; None after the last."""
    current = next(items, None)
    while current is not None:
        following = next(items, None)
        yield current, following
        current = following
