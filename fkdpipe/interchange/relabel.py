"""ReLabel and TokenLabeling: one label map per image, `<class>/<name>.pt`, pooled for crops.

A file is one tensor (2, K, H, W): scores before softmax and class ids of the top K classes in each
cell, float32 (ReLabel) or float16 (TokenLabeling). The files have no crops. Crops are drawn here
from the default distribution, and the map is pooled for each crop as in training with these maps: a
RoI-align of the dense map (0 where a class is not listed) to one cell, over the box scaled to the
map and shifted by half a cell, then softmax.

The published training code passes (top, left, bottom, right) to a RoI-align that takes (left, top,
right, bottom). `compat_transposed` reproduces this; the default pools the box of the crop.

Reference: Yun et al., "Re-labeling ImageNet: from Single to Multi-Labels, from Global to
Localized Labels", LabelPooling; RoI-align as in torchvision, aligned=False, adaptive sampling.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fkdpipe.common.errors import UsageError
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
from fkdpipe.storage import labels
from fkdpipe.storage.labels import Form
from fkdpipe.storage.settings import CropsSettings


def open_relabel(path: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """Open ReLabel's maps; see `_open`."""
    return _open("relabel", path, folder, settings)


def open_tokenlabeling(path: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """Open TokenLabeling's maps; see `_open`."""
    return _open("tokenlabeling", path, folder, settings)


def _open(name: str, path: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """Open label maps, and draw the crops they are pooled for.

    Raises:
        UsageError: the number of crops is not set.
        LabelsError: no files match, none can be read, or ids were rounded by float16.
    """
    M, keep, distribution = settings.crops, settings.keep, CropDistribution()
    if M is None:
        raise UsageError("label maps have no crops: choose how many to draw per image, --crops M.")
    tree = matching.match(path, folder, ".pt")
    classes = settings.classes or len(folder.class_names)
    refuse_half_ids(tree.first(_map).dtype, classes, str(path))
    if keep > classes:
        raise UsageError(f"--keep {keep}: there are {classes} classes.")

    def read(position: int) -> ImageLabels:
        scores_KHW, ids_KHW = parse(tree.read(position))
        if ids_KHW.min() < 0 or ids_KHW.max() >= classes:
            raise BrokenFileError("class-range", f"class {int(ids_KHW.max())} of {classes}")
        size = folder.size_N2[position : position + 1]
        sample = crops.sample(
            distribution,
            seed=settings.seed,
            image_id_N=crops.image_ids([folder.keys[position]]),
            size_N2=size,
            crops_M=np.arange(M),
        )
        box_M4 = sample.box_NM4[0].astype(np.int64)
        region_M4 = _fractions(box_M4, size[0], transposed=settings.compat_transposed)
        ids, prob = pool(scores_KHW, ids_KHW, region_M4, classes, keep)
        return ImageLabels(box_M4, sample.flip_NM[0], ids, prob)

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
        temperature=1.0,  # pooled scores go through a softmax without temperature
        origin={"pooling": "transposed" if settings.compat_transposed else "box"},
    )


def parse(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(scores float64, ids int64), (K, H, W) each, of a label map.

    Raises:
        BrokenFileError: the file holds something else.
    """
    label_map = _map(data)
    return label_map[0].astype(np.float64), whole_numbers(label_map[1], "class ids")


def _map(data: bytes) -> np.ndarray:
    """(2, K, H, W), as stored."""
    array = torchfile.as_array(torchfile.loads(data))
    if array.ndim != 4 or len(array) != 2 or not array.size:
        raise BrokenFileError("broken-label", f"a map of shape {array.shape}, not (2, K, H, W)")
    if not np.isfinite(array).all():
        raise BrokenFileError("broken-label", "scores that are not finite")
    return array


def pool(
    scores_KHW: np.ndarray, ids_KHW: np.ndarray, region_M4: np.ndarray, classes: int, keep: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64, probabilities float32), (M, keep) each, most probable first.

    Bilinear sampling is separable: a cell's weight is that of its row times that of its column.

    Args:
        region_M4: (left, top, right, bottom) as fractions of the map.
        classes: C. keep: classes kept of the softmax over all C.
    """
    K, H, W = ids_KHW.shape
    dense_XC = np.zeros((H * W, classes))  # 0 where a class is not listed
    np.put_along_axis(dense_XC, ids_KHW.reshape(K, -1).T, scores_KHW.reshape(K, -1).T, axis=1)
    left, top, right, bottom = region_M4.T
    rows_MH, columns_MW = _weights(top, bottom, H), _weights(left, right, W)
    weights_MX = (rows_MH[:, :, None] * columns_MW[:, None, :]).reshape(-1, H * W)
    score_MC = weights_MX @ dense_XC
    prob_MC = np.exp(score_MC - score_MC.max(axis=1, keepdims=True))
    prob_MC /= prob_MC.sum(axis=1, keepdims=True)
    ids, prob = labels.top_k(prob_MC, keep)
    return ids, prob.astype(np.float32)


def _weights(low_M: np.ndarray, high_M: np.ndarray, cells: int) -> np.ndarray:
    """float64 (M, cells): the weight of each row of a map in a RoI-align between two fractions.

    A sample weights a cell by 1 - |distance|; samples outside the map contribute zero weight.
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
    """(left, top, right, bottom) as fractions of the image; if transposed, (top, left, bottom,
    right), as in the published code."""
    top, left, height, width = box_M4.T.astype(np.float64)
    H, W = size.tolist()
    rows, columns = (top / H, (top + height) / H), (left / W, (left + width) / W)
    x, y = (rows, columns) if transposed else (columns, rows)
    return np.stack([x[0], y[0], x[1], y[1]], axis=1)
