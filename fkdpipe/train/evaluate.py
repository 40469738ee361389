"""Top-1 and top-5 accuracy on a folder: resize and centre crop exactly as timm does."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from fkdpipe import images
from fkdpipe.errors import ImagesError
from fkdpipe.images import ImageFolder
from fkdpipe.models import Preprocessing
from fkdpipe.progress import Reporter, silent
from fkdpipe.replay import normalise
from fkdpipe.taps import Outputs
from fkdpipe.teachers import Precision, autocast


@dataclass(frozen=True)
class Accuracy:
    """Percent of images whose class is the first, or among the first five, of the scores."""

    top1: float
    top5: float
    images: int
    skipped: int


def evaluate(
    module: nn.Module,
    preprocessing: Preprocessing,
    folder: ImageFolder,
    *,
    device: torch.device,
    columns: np.ndarray | None = None,
    precision: Precision = "float32",
    batch: int = 128,
    threads: int = 2,
    allow_none: bool = False,
    reporter: Reporter = silent,
) -> Accuracy:
    """Accuracy of a classifier on the images of a folder.

    Args:
        columns: int64, which outputs are the folder's classes; None for all in order.
        allow_none: no readable image is no error, for one process's share of a folder.

    Raises:
        ImagesError: no image can be read.
    """
    was_training = module.training
    module.eval()
    pick = None if columns is None else torch.from_numpy(columns).to(device)
    top1 = top5 = seen = 0
    with reporter.task("evaluate", len(folder), "images") as advance, torch.no_grad():
        for pixels, class_B in batches(preprocessing, folder, batch=batch, threads=threads):
            x = normalise(pixels.to(device), preprocessing.mean, preprocessing.std)
            with autocast(precision, device):
                out = module(x.contiguous(memory_format=torch.channels_last))
            logits_BC = (out.logits if isinstance(out, Outputs) else out).float()
            logits_BC = logits_BC if pick is None else logits_BC[:, pick]
            ranked = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
            hits = ranked == class_B.to(device)[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
            seen += len(class_B)
            advance(len(class_B))
    module.train(was_training)
    if not seen and allow_none:
        return Accuracy(0.0, 0.0, 0, len(folder))
    if not seen:
        raise ImagesError(f"{folder.root}: no image could be read.", code="no-images")
    return Accuracy(100 * top1 / seen, 100 * top5 / seen, seen, len(folder) - seen)


def batches(
    preprocessing: Preprocessing, folder: ImageFolder, *, batch: int, threads: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(uint8 (B, 3, H, W), int64 classes (B,)); unreadable images are left out."""
    p = preprocessing
    transform = create_transform(
        (3, *p.size),
        is_training=False,
        interpolation=p.interpolation,
        crop_pct=p.crop_pct,
        use_prefetcher=True,  # uint8 out, normalised on the device
    )
    paths = [images.path_of(folder.root, key) for key in folder.keys]
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[int, list[Future]]] = deque()
        for first in [*range(0, len(paths), batch), None, None]:
            if first is not None:
                some = paths[first : first + batch]
                ahead.append((first, [pool.submit(_load, path, transform) for path in some]))
            if len(ahead) > 1 or (first is None and ahead):
                begin, futures = ahead.popleft()
                loaded = [future.result() for future in futures]
                good = [k for k, pixels in enumerate(loaded) if pixels is not None]
                if good:
                    pixels = torch.from_numpy(np.stack([loaded[k] for k in good]))
                    yield pixels, torch.from_numpy(folder.class_N[begin:][good]).long()


def _load(path: bytes, transform: Any) -> np.ndarray | None:
    try:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))
    except OSError:
        return None
