"""SRe2L: one torch file per batch, `epoch_<E>/batch_<B>.tar`, in the order of a seeded sampler.

A file holds [coordinates (B, 4), flips (B,), mix index, mix share, mix box, scores (B, C)]:
fractions as FKD's, scores before softmax in float16 or float32. Which image a row belongs to is
not stored; it follows from the sampler (torch's RandomSampler on a generator of `sampler_seed`,
one permutation after the other) and torchvision's order of the same images. An epoch is a crop.
Files written with mixup or cutmix have labels of mixed pixels and are refused.
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

_OPEN_FILES = 2048  # batch files held open, as maps of the file and not in memory


def open_labels(place: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """SRe2L's batch files; the images must be those they were made from, all of them.

    Raises:
        LabelsError: files are missing, mixed, or of another number of images.
    """
    epochs = _epochs(place, settings.crops)
    batch, classes = _parse(epochs[0] / "batch_0.tar")[2].shape
    index_N = imagefolder.index_of(folder.keys, (r.key for r in folder.rejected))
    images = int(index_N.max()) + 1
    for epoch in epochs:
        _check_epoch(epoch, images, batch)

    def parse_checked(epoch: int, number: int) -> Batch:
        found = parse(epochs[epoch] / f"batch_{number}.tar")
        expected = (min(batch, images - number * batch), classes)
        if found[2].shape != expected:
            raise BrokenFileError(
                "broken-label", f"batch_{number}: scores of {found[2].shape}, not {expected}"
            )
        return found

    place_EN = _order(len(epochs), images, settings.sampler_seed)
    opened: Callable[[int, int], Batch] = lru_cache(_OPEN_FILES)(parse_checked)

    def read(position: int) -> ImageLabels:
        index = int(index_N[position])
        if index < 0:
            raise BrokenFileError("no-label", "torchvision's ImageFolder does not list this file")
        rows = []
        for epoch, at in enumerate(place_EN[:, index].tolist()):
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
        temperature=1.0,  # scores before softmax: the temperature is still free
        origin={"sampler_seed": settings.sampler_seed},
    )


def parse(file: Path) -> Batch:
    """Coordinates, flips and scores of a batch, mapped from the file and not read.

    Raises:
        BrokenFileError: "mixed" when pixels were mixed; the file is missing or something else.
    """
    found = torchfile.load_mapped(file)
    if not isinstance(found, (list, tuple)) or len(found) != 6:
        raise BrokenFileError("broken-label", f"{file.name} is no batch of six entries")
    if any(mix is not None for mix in found[2:5]):
        raise BrokenFileError("mixed", f"{file.name} was made with mixup or cutmix")
    fraction, flip, scores = (torchfile.as_array(found[k]) for k in (0, 1, 5))
    if (fraction.ndim, flip.ndim, scores.ndim) != (2, 1, 2) or not scores.size:
        raise BrokenFileError("broken-label", f"{file.name}: entries of another shape")
    if not len(fraction) == len(flip) == len(scores):
        raise BrokenFileError("broken-label", f"{file.name}: entries of unequal number")
    if scores.dtype.kind != "f":
        raise BrokenFileError("broken-label", f"{file.name}: scores of type {scores.dtype}")
    return fraction, whole_numbers(flip.astype(np.uint8), "flips").astype(bool), scores


def _epochs(place: Path, crops: int | None) -> list[Path]:
    """Folders of the epochs in order, the first `crops` of them.

    Raises:
        LabelsError: none, or fewer than asked for.
    """
    found = {}
    for path in place.glob("epoch_*"):
        name = re.fullmatch(r"epoch_(\d{1,6})", path.name)
        if name and path.is_dir():
            found[int(name[1])] = path
    wanted = crops or len(found)
    if not found:
        raise LabelsError(f"{place} has no folder epoch_<E>.", code="no-labels")
    if set(range(wanted)) - set(found):
        raise LabelsError(
            f"{place} has {len(found)} of the folders epoch_<E>; {wanted} are needed, from epoch_0 "
            "on: the order of an epoch follows from all those before it.",
            code="no-labels",
        )
    return [found[epoch] for epoch in range(wanted)]


def _parse(file: Path) -> Batch:
    """A batch that the import cannot do without.

    Raises:
        LabelsError: it cannot be read, or pixels were mixed.
    """
    try:
        return parse(file)
    except BrokenFileError as error:
        hint = ""
        if error.code == "mixed":
            hint = (
                " Such labels belong to two images at once and only to the same batches; only "
                "files written without --mix-type can be imported."
            )
        raise LabelsError(f"{file.parent}: {error}.{hint}", code=error.code) from error


def _check_epoch(epoch: Path, images: int, batch: int) -> None:
    """Every image counts: with one more or less, the sampler's whole order is another.

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
            "placed by their order, so labels that were thinned out, or made from other images, "
            "cannot be imported.",
            code="wrong-folder",
        )
    rows = (count - 1) * batch + len(_parse(epoch / f"batch_{count - 1}.tar")[0])
    if rows != images:
        raise LabelsError(
            f"{epoch} holds labels of {rows:,} images, and torchvision's ImageFolder lists "
            f"{images:,}. Rows are placed by their order: use the folder they were made for.",
            code="wrong-folder",
        )


def _order(epochs: int, images: int, seed: int) -> np.ndarray:
    """int32 (E, N): where in each epoch every image comes."""
    import torch
    from torch.utils.data import RandomSampler

    sampler = RandomSampler(range(images), generator=torch.Generator().manual_seed(seed))
    place_EN = scratch_table(epochs, images)
    for epoch in range(epochs):
        drawn = np.array(list(sampler))  # to the end, where it draws once more from the generator
        place_EN[epoch, drawn] = np.arange(images)
    return place_EN
