"""SRe2L: one torch file per batch, `epoch_<E>/batch_<B>.tar`, in the order of a seeded sampler.

A file holds [coordinates (B, 4), flips (B,), mix index, mix share, mix box, scores (B, C)], with
fractions as in FKD, and scores before softmax in float16 or float32. The image of a row is not
stored. It follows from the sampler (torch's RandomSampler with a generator of `sampler_seed`, one
permutation per epoch) and torchvision's order of the same images. Each epoch gives one crop. Files
written with mixup or cutmix have labels of mixed pixels and are refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from fkdpipe.common.errors import LabelsError
from fkdpipe.interchange import imagefolder, torchfile
from fkdpipe.interchange.source import (
    ImageLabels,
    ImportSettings,
    LabelSource,
    imported_distribution,
    scratch_table,
    to_pixels,
    whole_numbers,
)
from fkdpipe.interchange.torchfile import BrokenFileError
from fkdpipe.pixels.images import ImageFolder
from fkdpipe.storage.labels import Form

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # coordinates, flips, scores

_OPEN_FILES = 2048  # batch files kept open, memory-mapped


def open_labels(path: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """Open SRe2L's batch files; the folder must hold all images they were made from, and no others.

    Raises:
        LabelsError: files are missing, mixed, or of another number of images.
    """
    epochs = _epochs(path, settings.crops)
    batch, classes = _parse(epochs[0] / "batch_0.tar")[2].shape
    index_N = imagefolder.index_of(folder.keys, (r.key for r in folder.rejected))
    images = int(index_N.max()) + 1
    for epoch in epochs:
        _check_epoch(epoch, images, batch)

    def parse_checked(epoch: int, number: int) -> Batch:
        content = parse(epochs[epoch] / f"batch_{number}.tar")
        expected = (min(batch, images - number * batch), classes)
        if content[2].shape != expected:
            detail = f"batch_{number}: scores of shape {content[2].shape}, not {expected}"
            raise BrokenFileError("broken-label", detail)
        return content

    index_EN = _order(len(epochs), images, settings.sampler_seed)
    opened: Callable[[int, int], Batch] = lru_cache(_OPEN_FILES)(parse_checked)

    def read(position: int) -> ImageLabels:
        index = int(index_N[position])
        if index < 0:
            raise BrokenFileError("no-label", "torchvision's ImageFolder does not list this file")
        rows = []
        for epoch, at in enumerate(index_EN[:, index].tolist()):
            number, row = divmod(at, batch)
            rows.append([values[row] for values in opened(epoch, number)])
        fraction, flip, scores = (np.stack(column) for column in zip(*rows, strict=True))
        box, moved = to_pixels(fraction, folder.size_N2[position].tolist())
        return ImageLabels(box, flip, logit_MC=scores, moved=moved)

    return LabelSource(
        format="sre2l",
        form=Form("logits"),
        classes=classes,
        classes_known=True,
        crops=len(epochs),
        distribution=imported_distribution("sre2l", len(epochs)),
        fingerprint=hashlib.sha256((epochs[0] / "batch_0.tar").read_bytes()).hexdigest(),
        read=read,
        temperature=1.0,  # scores before softmax, so any temperature can be applied
        origin={"sampler_seed": settings.sampler_seed},
    )


def parse(file: Path) -> Batch:
    """Coordinates, flips and scores of a batch, memory-mapped from the file.

    Raises:
        BrokenFileError: "mixed" if pixels were mixed; the file is missing or holds something else.
    """
    content = torchfile.load_mapped(file)
    if not isinstance(content, (list, tuple)) or len(content) != 6:
        raise BrokenFileError("broken-label", f"{file.name} is not a batch of six entries")
    if any(mix is not None for mix in content[2:5]):
        raise BrokenFileError("mixed", f"{file.name} was made with mixup or cutmix")
    fraction, flip, scores = (torchfile.as_array(content[k]) for k in (0, 1, 5))
    if (fraction.ndim, flip.ndim, scores.ndim) != (2, 1, 2) or not scores.size:
        raise BrokenFileError("broken-label", f"{file.name}: entries of invalid shapes")
    if not len(fraction) == len(flip) == len(scores):
        raise BrokenFileError("broken-label", f"{file.name}: entries of different lengths")
    if scores.dtype.kind != "f":
        raise BrokenFileError("broken-label", f"{file.name}: scores of type {scores.dtype}")
    return fraction, whole_numbers(flip.astype(np.uint8), "flips").astype(bool), scores


def _epochs(root: Path, crops: int | None) -> list[Path]:
    """Folders of the first `crops` epochs in order, or of all.

    Raises:
        LabelsError: there are none, or fewer than requested.
    """
    folders = {}
    for path in root.glob("epoch_*"):
        name = re.fullmatch(r"epoch_(\d{1,6})", path.name)
        if name and path.is_dir():
            folders[int(name[1])] = path
    count = crops or len(folders)
    if not folders:
        raise LabelsError(f"{root} has no folder epoch_<E>.", code="no-labels")
    if set(range(count)) - set(folders):
        raise LabelsError(
            f"{root} has {len(folders)} of the folders epoch_<E>; {count} are needed, from epoch_0 "
            "on: the order of an epoch depends on all epochs before it.",
            code="no-labels",
        )
    return [folders[epoch] for epoch in range(count)]


def _parse(file: Path) -> Batch:
    """Parse a batch that the import needs.

    Raises:
        LabelsError: it cannot be read, or its pixels were mixed.
    """
    try:
        return parse(file)
    except BrokenFileError as error:
        hint = ""
        if error.code == "mixed":
            hint = (
                " Such labels belong to two images and only to the same batches. Only files "
                "written without --mix-type can be imported."
            )
        raise LabelsError(f"{file.parent}: {error}.{hint}", code=error.code) from error


def _check_epoch(epoch: Path, images: int, batch: int) -> None:
    """Check the number of images, since any other number changes the sampler's whole order.

    Raises:
        LabelsError: the files of an epoch cannot be those of this many images.
    """
    names = {path.name for path in epoch.iterdir()}
    count = -(-images // batch)
    missing = [n for n in range(count) if f"batch_{n}.tar" not in names]
    beyond = f"batch_{count}.tar" in names
    if missing or beyond:
        raise LabelsError(
            f"{epoch}: {images:,} images in batches of {batch:,} are {count:,} files; "
            f"{f'{len(missing):,} of them are missing' if missing else 'there are more'}. Rows are "
            "matched by their order, so a subset of labels, or labels of other images, cannot be "
            "imported.",
            code="wrong-folder",
        )
    rows = (count - 1) * batch + len(_parse(epoch / f"batch_{count - 1}.tar")[0])
    if rows != images:
        raise LabelsError(
            f"{epoch} holds labels of {rows:,} images, and torchvision's ImageFolder lists "
            f"{images:,}. Rows are matched by their order: use the folder they were made for.",
            code="wrong-folder",
        )


def _order(epochs: int, images: int, seed: int) -> np.ndarray:
    """int32 (E, N): the position of every image in each epoch."""
    import torch
    from torch.utils.data import RandomSampler

    sampler = RandomSampler(range(images), generator=torch.Generator().manual_seed(seed))
    index_EN = scratch_table(epochs, images)
    for epoch in range(epochs):
        order = np.array(list(sampler))  # to the end, where it draws once more from the generator
        index_EN[epoch, order] = np.arange(images)
    return index_EN
