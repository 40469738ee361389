"""Top-1 and top-5 accuracy on an image folder, with timm's resize and centre crop."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from fkdpipe.common import disk
from fkdpipe.common.distributed import choose_device, default_threads
from fkdpipe.common.errors import ImagesError
from fkdpipe.common.progress import Reporter, silent
from fkdpipe.networks.class_maps import ClassMap
from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.networks.models import Preprocessing
from fkdpipe.networks.teachers import (
    Network,
    Precision,
    as_networks,
    autocast,
    load_teachers,
    not_finite,
)
from fkdpipe.pixels import images
from fkdpipe.pixels.images import ImageFolder
from fkdpipe.pixels.replay import DECODE_ERRORS, cpu, normalise
from fkdpipe.train.batch import with_next

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy in percent.

    Attributes:
        images: number of evaluated images. skipped: number of files that were left out.
        failed: key -> code and message of every file that was left out. Empty in the totals of a
            training run, whose processes log their own.
    """

    top1: float
    top5: float
    images: int
    skipped: int
    failed: dict[str, str] = field(default_factory=dict)


def evaluate(
    model: Network | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    split: Literal["train", "val"] | None = None,
    class_map: ClassMap | Path | None = None,
    numbered: bool = False,
    real: Path | None = None,
    precision: Precision = "float32",
    batch_size: int = 128,
    threads: int | None = None,
    device: torch.device | str | None = None,
    reporter: Reporter = silent,
) -> Accuracy:
    """Top-1 and top-5 accuracy of a classifier on an image folder: `fkdpipe evaluate`.

    Images are resized and centre-cropped as in timm, with the model's own size, crop_pct,
    interpolation, mean and std. Files that cannot be read are left out, and logged.

    Args:
        model: a run folder, NAME or NAME=FILE as for `--teacher`, a module, or the result of
            `load_teacher`, which takes the preprocessing of a module that has none.
        data: an image folder, one folder per class, optionally below train/ and val/.
        split: default: val, or the folder itself if it holds the classes.
        class_map: maps outputs to classes; see `load_teacher`.
        numbered: folders are named by class index, as in ImageNet-V2.
        real: ImageNet-ReaL's `real.json`, which accepts several classes per image.
        precision: float32, bfloat16 or float16. batch_size: in images. threads: for decoding.
        device: None uses a GPU if there is one.

    Raises:
        UsageError: invalid arguments.
        ModelError: the model cannot be built, its outputs do not match the folder's classes, or
            they are not finite.
        ImagesError: no usable images.
    """
    root, where = Path(data), choose_device(device)
    with reporter.task("scan", 0, "files") as advance:
        chosen = split or ("val" if images.splits_of(root) else "train")
        folder = images.scan(root, split=chosen, on_image=advance)
    for remark in images.remarks(folder):
        log.warning("%s", remark)
    (loaded,) = load_teachers(
        as_networks(model),
        class_names=folder.class_names,
        class_maps=[] if class_map is None else [class_map],
        numbered=numbered,
        precision=precision,
        device=where,
    )
    result = accuracy(
        loaded.module,
        loaded.preprocessing,
        folder,
        name=str(loaded.spec),
        device=where,
        columns=loaded.columns,
        precision=loaded.precision,
        batch_size=batch_size,
        threads=threads or default_threads(),
        accepted=read_accepted(real, folder) if real else None,
        reporter=reporter,
    )
    log_failed(result)
    rejected = {r.key: f"{r.reason}: {r.detail}" for r in folder.rejected}
    failed = rejected | result.failed
    return replace(result, skipped=len(failed), failed=failed)


def log_failed(result: Accuracy, most: int = 20) -> None:
    """Warn of the images that could not be read."""
    for key, why in list(result.failed.items())[:most]:
        log.warning("%s is left out: %s", key, why.replace(": ", ", ", 1))
    if len(result.failed) > most:
        log.warning("... and %d more images are left out", len(result.failed) - most)


def accuracy(
    module: nn.Module,
    preprocessing: Preprocessing,
    folder: ImageFolder,
    *,
    device: torch.device,
    name: str | None = None,
    columns: np.ndarray | None = None,
    precision: Precision = "float32",
    batch_size: int = 128,
    threads: int = 2,
    allow_none: bool = False,
    accepted: Sequence[frozenset[int]] | None = None,
    stopping: Callable[[], bool] = lambda: False,
    reporter: Reporter = silent,
) -> Accuracy:
    """Accuracy of a classifier on the images of a folder.

    Args:
        name: of the network, for the error; without one, as during training, outputs that are not
            finite only count as wrong, with a warning.
        columns: int64, outputs for the folder's classes; None for all in order.
        allow_none: accept that no image is readable, as in one process's share of a folder.
        accepted: correct classes of every image (ImageNet-ReaL); images without any are left
            out.
        stopping: called between batches; True ends the evaluation early.

    Raises:
        ImagesError: no image can be read.
        ModelError: outputs are not finite.
    """
    was_training = module.training
    module.eval()
    if accepted is not None:
        rows = np.array([row for row, right in enumerate(accepted) if right], dtype=np.int64)
        folder, accepted = folder.take(rows), [accepted[row] for row in rows]
    pick = None if columns is None else torch.from_numpy(columns).to(device)
    top1 = top5 = seen = spoilt = 0
    failed: dict[str, str] = {}
    loaded = batches(
        preprocessing, folder, batch=batch_size, threads=threads, on_failure=failed.__setitem__
    )
    with reporter.task("evaluate", len(folder), "images") as advance, torch.no_grad():
        for pixels, row_B in loaded:
            x = normalise(pixels.to(device), preprocessing.mean, preprocessing.std)
            with autocast(precision, device):
                out = module(x.contiguous(memory_format=torch.channels_last))
            logits_BC = (out.logits if isinstance(out, Outputs) else out).float()
            logits_BC = logits_BC if pick is None else logits_BC[:, pick]
            ranked = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
            finite_B = logits_BC.isfinite().all(1).cpu()
            if name is not None and not finite_B.all():
                raise not_finite(name, precision)
            spoilt += int((~finite_B).sum())
            hits = _hits(ranked.cpu(), row_B, folder, accepted) & finite_B[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.any(dim=1).sum())
            seen += len(row_B)
            advance(len(row_B))
            if stopping():
                break
    module.train(was_training)
    if spoilt:
        log.warning("outputs for %d of %d images are not finite and count as wrong", spoilt, seen)
    if not seen and not allow_none:
        raise _nothing_read(folder, failed)
    share = 100 / max(seen, 1)
    return Accuracy(share * top1, share * top5, seen, len(failed), failed)


def _nothing_read(folder: ImageFolder, failed: dict[str, str]) -> ImagesError:
    example = "".join(f"; for example {key}: {why}" for key, why in list(failed.items())[:1])
    return ImagesError(
        f"{folder.root}: none of {len(folder)} images could be read{example}.", code="no-images"
    )


def _hits(
    ranked_BK: torch.Tensor,
    row_B: torch.Tensor,
    folder: ImageFolder,
    accepted: Sequence[frozenset[int]] | None,
) -> torch.Tensor:
    """bool (B, K): whether each of the K best classes is correct."""
    if accepted is None:
        return ranked_BK == torch.from_numpy(folder.class_N[row_B.numpy()]).long()[:, None]
    return torch.tensor(
        [
            [c in accepted[row] for c in best]
            for best, row in zip(ranked_BK.tolist(), row_B.tolist(), strict=True)
        ]
    )


def read_accepted(file: Path, folder: ImageFolder) -> list[frozenset[int]]:
    """The correct classes of each image, from ImageNet-ReaL's `real.json`.

    The file lists the class indices of each image, in order of file name.

    Raises:
        ImagesError: invalid file, or its number of images differs from the folder's.
    """
    disk.refuse_pointer(file, ImagesError)
    try:
        lists = json.loads(file.read_text())
        sets = [frozenset(int(c) for c in classes) for classes in lists]
    except (OSError, ValueError, TypeError) as error:
        raise ImagesError(
            f"{file} is not a list of class lists: {error}.", code="labels"
        ) from error
    if len(sets) != len(folder):
        raise ImagesError(
            f"{file} has labels for {len(sets)} images, {folder.root} has {len(folder)} images.",
            code="labels",
        )
    by_name = sorted(range(len(folder)), key=lambda row: folder.keys[row].rsplit("/", 1)[-1])
    accepted: list[frozenset[int]] = [frozenset()] * len(folder)
    for row, right in zip(by_name, sets, strict=True):
        accepted[row] = right
    return accepted


def batches(
    preprocessing: Preprocessing,
    folder: ImageFolder,
    *,
    batch: int,
    threads: int,
    on_failure: Callable[[str, str], None] = lambda key, why: None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield uint8 pixels (B, 3, H, W) and int64 rows of the folder (B,).

    Args:
        on_failure: called with key and reason of an unreadable image, which is left out.
    """
    p = preprocessing
    transform = create_transform(
        (3, *p.size),
        is_training=False,
        interpolation=p.interpolation,
        crop_pct=p.crop_pct,
        use_prefetcher=True,  # uint8 out, normalised on the device
    )
    with ThreadPoolExecutor(threads) as pool:

        def begin(first: int) -> list[Future[np.ndarray | str]]:
            rows = range(first, min(first + batch, len(folder)))
            return [pool.submit(_load, folder, row, transform) for row in rows]

        starts = range(0, len(folder), batch)
        loading = zip(starts, map(begin, starts), strict=True)
        for (first, futures), _ in with_next(loading):  # the next batch loads in the background
            good = {}
            for row, future in enumerate(futures, first):
                pixels = future.result()
                if isinstance(pixels, str):
                    on_failure(folder.keys[row], pixels)
                else:
                    good[row] = pixels
            if good:
                yield torch.from_numpy(np.stack(list(good.values()))), torch.tensor(list(good))


def _load(folder: ImageFolder, row: int, transform: Any) -> np.ndarray | str:
    """An image's pixels, or why it cannot be read, in the words of training."""
    path = images.path_of(folder.root, folder.keys[row])
    try:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))
    except DECODE_ERRORS as error:
        failure = cpu.decode(path, tuple(folder.size_N2[row].tolist()))
        return ": ".join(failure) if isinstance(failure, tuple) else f"unreadable: {error}"
