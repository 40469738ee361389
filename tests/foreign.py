"""Label files as the other systems write them, from their formats' descriptions alone: nothing of
fkdpipe.interchange is used here, so that readers and writers are tested against a third party."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

Truth = dict[str, dict[str, np.ndarray]]  # image key to box, flip, ids, prob


def make_truth(
    folder, *, crops: int, k: int, classes: int, seed: int = 0, half: bool = False
) -> Truth:
    """Random boxes, flips and descending labels for every image of a scanned folder."""
    random = np.random.default_rng(seed)
    truth = {}
    for key, size in zip(folder.keys, folder.size_N2.tolist(), strict=True):
        H, W = size
        h, w = random.integers(1, H + 1, crops), random.integers(1, W + 1, crops)
        top = (random.random(crops) * (H - h + 1)).astype(int)
        left = (random.random(crops) * (W - w + 1)).astype(int)
        ids = np.stack([random.choice(classes, k, replace=False) for _ in range(crops)])
        prob = random.random((crops, k)) ** 4
        prob = -np.sort(-prob / (prob.sum(1, keepdims=True) * (1 + random.random((crops, 1)))), 1)
        prob = prob.astype(np.float16 if half else np.float32).astype(np.float32)
        truth[key] = {
            "box": np.stack([top, left, h, w], axis=1),
            "flip": random.random(crops) < 0.5,
            "ids": ids,
            "prob": prob,
            "size": np.array(size),
        }
    return truth


def fkd_state(entry: dict, *, label: str, dtype=np.float32) -> list[np.ndarray]:
    """FKD: fractions of the image, flips, and labels of one of its kinds."""
    H, W = entry["size"]
    fraction = (entry["box"] / np.array([H, W, H, W])).astype(dtype)
    if label == "hard":
        out = entry["ids"][:, 0].astype(np.int64)
    elif label == "smoothing":
        out = np.stack([entry["ids"][:, 0], entry["prob"][:, 0]], axis=1).astype(dtype)
    else:
        out = np.stack([entry["ids"], entry["prob"]], axis=1).astype(dtype)
    return [fraction, entry["flip"].astype(bool), out]


def write_fkd(
    place: Path, truth: Truth, *, label="marginal", dtype=np.float32, tensors=False, prefix="train"
) -> Path:
    """One file per image; a name loses its extension only."""
    for key, entry in truth.items():
        path = place / prefix / f"{key.rsplit('.', 1)[0]}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = fkd_state(entry, label=label, dtype=dtype)
        torch.save([torch.from_numpy(a) for a in state] if tensors else state, path)
    return place


def fkd_loader_key(path: str) -> str:
    """How FKD's trainer names the label of an image: the last three parts, up to the first dot."""
    return "/".join(path.split("/")[-3:]).split(".")[0]


def fkd_dense(label: np.ndarray, kind: str, classes: int) -> np.ndarray:
    """FKD's rule from a stored (2, K) label to probabilities of all classes."""
    ids, prob = label[0].astype(int), label[1].astype(np.float64)
    k = len(ids)
    if kind == "marginal_renorm":
        dense = np.zeros(classes)
        dense[ids] = prob / np.abs(prob).sum()
        return dense
    dense = np.full(classes, (1 - prob.sum()) / (classes - k))
    dense[ids] = prob
    return dense
