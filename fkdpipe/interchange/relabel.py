"""ReLabel and TokenLabeling: one label map per image, `<class>/<name>.pt`, pooled for crops.

A file is one tensor (2, K, H, W): scores before softmax and class ids of the K best classes in
every cell, float32 (ReLabel) or float16 (TokenLabeling). There are no crops; they are drawn here
by our own distribution, and the map is pooled for each as in training with these maps: a
RoI-align of the dense map (0 where a class is not listed) over the box, scaled to
the map and shifted by half a cell, to one cell, then softmax.

The published training passes (top, left, bottom, right) where the RoI-align takes (left, top,
right, bottom). `compat_transposed` reproduces that; the default pools the box that was cut.

Reference: Yun et al., "Re-labeling ImageNet: from Single to Multi-Labels, from Global to
Localized Labels", LabelPooling; RoI-align as in torchvision, aligned=False, adaptive sampling.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fkdpipe.common.errors import LabelsError, UsageError
from fkdpipe.interchange import matching, torchfile
from fkdpipe.interchange.source import (
    ImageLabels,
    ImportSettings,
    LabelSource,
    refuse_half_ids,
    whole_numbers,
)
from fkdpipe.interchange.torchfile import BrokenFileError
from fkdpipe.pixels import crops
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.pixels.images import ImageFolder
from fkdpipe.storage.labels import Form
from fkdpipe.storage.settings import CropsSettings


def open_relabel(place: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """ReLabel's maps; see `_open`."""
    return _open("relabel", place, folder, settings)


def open_tokenlabeling(place: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """TokenLabeling's maps; see `_open`."""
    return _open("tokenlabeling", place, folder, settings)


def _open(name: str, place: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """Label maps, and the crops they are pooled for.

    Raises:
        UsageError: the number of crops is not given.
        LabelsError: no files that fit, none that can be read, or ids rounded by float16.
    """
    M, keep, distribution = settings.crops, settings.keep, CropDistribution()
    if M is None:
        raise UsageError("label maps have no crops: say how many to draw per image, --crops M.")
    tree = matching.match(place, folder, ".pt")
    classes = settings.classes or len(folder.class_names)
    refuse_half_ids(_first_dtype(tree), classes, str(place))
    if keep > classes:
        raise UsageError(f"--keep {keep}: there are {classes} classes.")

    def read(position: int) -> ImageLabels:
        scores_KHW, ids_KHW = parse(tree.read(position))
        if ids_KHW.min() < 0 or ids_KHW.max() >= classes:
            raise BrokenFileError("class-range", f"class {int(ids_KHW.max())} of {classes}")
        size = folder.size_N2[position : position + 1]
        drawn = crops.sample(
            distribution,
            seed=settings.seed,
            image_id_N=crops.image_ids([folder.keys[position]]),
            size_N2=size,
            crops_M=np.arange(M),
        )
        box_M4 = drawn.box_NM4[0].astype(np.int64)
        region_M4 = _fractions(box_M4, size[0], transposed=settings.compat_transposed)
        ids, prob = pool(scores_KHW, ids_KHW, region_M4, classes, keep)
        return ImageLabels(box_M4, drawn.flip_NM[0], ids, prob)

    return LabelSource(
        format=name,
        form=Form("topk", keep),
        classes=classes,
        classes_known=settings.classes is not None,
        crops=M,
        distribution=CropsSettings.of(distribution, seed=settings.seed, count=M),
        fingerprint=tree.fingerprint(),
        read=read,
        extra=tree.extra,
        extra_examples=tree.extra_examples,
        temperature=1.0,  # pooled scores go through a plain softmax
        origin={"pooling": "transposed" if settings.compat_transposed else "box"},
    )


def parse(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(scores float64, ids int64), (K, H, W) each, of a label map.

    Raises:
        BrokenFileError: something else is in the file.
    """
    found = torchfile.as_array(torchfile.loads(data))
    if found.ndim != 4 or len(found) != 2 or not found.size:
        raise BrokenFileError("broken-label", f"a map of shape {found.shape}, not (2, K, H, W)")
    if not np.isfinite(found).all():
        raise BrokenFileError("broken-label", "scores that are not finite")
    return found[0].astype(np.float64), whole_numbers(found[1], "class ids")


def pool(
    scores_KHW: np.ndarray, ids_KHW: np.ndarray, region_M4: np.ndarray, classes: int, keep: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64, probabilities float32), (M, keep) each, most probable first.

    Args:
        region_M4: (left, top, right, bottom) as fractions of the map.
        classes: C. keep: classes kept of the softmax over all C.

    Only listed classes are pooled: the others' score is 0 everywhere. Bilinear sampling is
    separable, so a crop's weights are those of its rows times those of its columns.
    """
    H, W = ids_KHW.shape[1:]
    listed, place_KHW = np.unique(ids_KHW, return_inverse=True)
    dense_HWL = np.zeros((H, W, len(listed)))
    rows, columns = np.mgrid[:H, :W]
    for k in range(len(ids_KHW)):
        dense_HWL[rows, columns, place_KHW.reshape(ids_KHW.shape)[k]] = scores_KHW[k]
    left, top, right, bottom = region_M4.T
    down, across = _weights(top, bottom, H), _weights(left, right, W)
    weights = (down[:, :, None] * across[:, None, :]).reshape(-1, H * W)
    pooled_ML = weights @ dense_HWL.reshape(H * W, -1)
    others = _some_others(listed, classes, keep)
    ids_L = np.concatenate([listed, others])
    score_ML = np.concatenate([pooled_ML, np.zeros((len(pooled_ML), len(others)))], axis=1)
    largest = np.maximum(score_ML.max(axis=1, keepdims=True), 0 if len(listed) < classes else -1e30)
    total = np.exp(pooled_ML - largest).sum(axis=1, keepdims=True)
    total += (classes - len(listed)) * np.exp(-largest)
    best = np.argpartition(-score_ML, keep - 1, axis=1)[:, :keep]
    rank = np.argsort(-np.take_along_axis(score_ML, best, 1), axis=1, kind="stable")
    order = np.take_along_axis(best, rank, 1)
    prob = np.exp(np.take_along_axis(score_ML, order, 1) - largest) / total
    return ids_L[order], prob.astype(np.float32)


def _some_others(listed: np.ndarray, classes: int, count: int) -> np.ndarray:
    """Up to `count` classes that are not listed, the first there are; their score is 0."""
    candidates = np.arange(min(classes, len(listed) + count))
    return np.setdiff1d(candidates, listed)[:count]


def _weights(low_M: np.ndarray, high_M: np.ndarray, cells: int) -> np.ndarray:
    """float64 (M, cells): what each row of a map weighs in a RoI-align between two fractions.

    A sample weighs a cell by how near it is, 1 - |distance|; samples outside the map count as 0.
    """
    begin = low_M * cells - 0.5
    length = np.maximum(high_M * cells - 0.5 - begin, 1.0)
    samples = np.ceil(length)
    number = np.arange(int(samples.max()))
    at_MS = begin[:, None] + (number + 0.5) * (length / samples)[:, None]
    inside = (number < samples[:, None]) & (at_MS >= -1) & (at_MS <= cells)
    at_MS = np.clip(at_MS, 0, cells - 1)
    near = np.maximum(1 - np.abs(at_MS[:, :, None] - np.arange(cells)), 0)
    return (near * inside[:, :, None]).sum(axis=1) / samples[:, None]


def _fractions(box_M4: np.ndarray, size: np.ndarray, *, transposed: bool) -> np.ndarray:
    """(left, top, right, bottom) as fractions of the image; (top, left, bottom, right) as
    published, where rows are taken for columns."""
    top, left, height, width = box_M4.T.astype(np.float64)
    H, W = size.tolist()
    rows, columns = (top / H, (top + height) / H), (left / W, (left + width) / W)
    x, y = (rows, columns) if transposed else (columns, rows)
    return np.stack([x[0], y[0], x[1], y[1]], axis=1)


def _first_dtype(tree: matching.LabelTree) -> np.dtype:
    """Number type of the first map that can be read.

    Raises:
        LabelsError: none of a sample can be.
    """
    reasons = []
    for position in tree.sample():
        try:
            data = tree.read(position)
            parse(data)
            return torchfile.as_array(torchfile.loads(data)).dtype
        except BrokenFileError as error:
            reasons.append(f"{tree.keys[position]}: {error}")
    raise LabelsError(
        f"none of {len(reasons)} label maps could be read; for example {reasons[0]}.",
        code="broken-labels",
    )
