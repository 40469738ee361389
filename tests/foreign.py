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


def imagefolder_keys(root: Path) -> list[str]:
    """The images below a split's root in torchvision's order, as keys."""
    from torchvision.datasets import ImageFolder

    return [str(Path(path).relative_to(root)) for path, _ in ImageFolder(root).samples]


def write_mldr(
    place: Path,
    truth: Truth,
    order: list[str],
    *,
    operations: dict[str, list] | None = None,
    compress: bool = True,
    seed: int = 0,
) -> Path:
    """ml-dr: per image its samples with parameters in a fixed order, K classes in no order.

    Args:
        operations: further transformation -> its parameter per crop, None where it was skipped.
    """
    random = np.random.default_rng(seed)
    operations = operations or {}
    mixes = [name for name in ("mixup", "cutmix") if name in operations]
    names = ["uint8", "random_resized_crop", "random_horizontal_flip", *operations, "to_tensor"]
    config = {
        "dataset": "imagenet",
        "num_classes": 1000,
        "gpu": None,
        "teacher": {"timm_ensemble": True, "name": "a,b"},
        "reinforce": {
            "topk": 3,
            "image_augmentation": {name: {"enable": True} for name in names},
        },
    }
    place.mkdir(parents=True)
    torch.save(config, place / "config.pth.tar")
    for index, key in enumerate(order):
        entry, samples = truth[key], []
        for crop in range(len(entry["flip"])):
            box = tuple(entry["box"][crop].tolist())
            flip = bool(entry["flip"][crop])
            done = {name: values[crop] for name, values in operations.items()}
            mixed = any(done[name] is not None for name in mixes)
            single = {"random_resized_crop": box, "random_horizontal_flip": flip}
            single |= {n: v for n, v in done.items() if n not in mixes}
            if compress:
                params: object = [index + 1 if mixed else None] if mixes else []
                params += [[v, v] if mixed else v for v in single.values()]
                params += [done[name] for name in mixes]
            else:
                params = {n: (v, v) for n, v in single.items()} | {n: done[n] for n in mixes}
                if mixes:
                    params["id2"] = index + 1
            shuffle = random.permutation(len(entry["ids"][crop]))
            prob = [float(p) for p in entry["prob"][crop][shuffle]]
            ids = [int(c) for c in entry["ids"][crop][shuffle]]
            samples.append({"params": params, "prob": (prob, ids)})
        torch.save((index, samples), place / f"{index}.pth.tar", pickle_protocol=4)
    return place


class SeededRandom:
    """The `random` module as TinyViT's transforms see it: every number from one PCG64 stream."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(seed))

    def random(self) -> float:
        return self.generator.random()

    def uniform(self, a: float, b: float) -> float:
        return self.random() * (b - a) + a

    def randint(self, a: int, b: int) -> int:
        return min(int(self.random() * (b - a + 1)) + a, b)


def timm_crop_and_flip(seed: int, height: int, width: int) -> tuple[int, int, int, int, bool]:
    """timm 0.4's RandomResizedCropAndInterpolation and flip, drawing from a seed."""
    import math

    random = SeededRandom(seed)

    def box():
        for _ in range(10):
            target_area = random.uniform(0.08, 1.0) * (width * height)
            aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w = int(round(math.sqrt(target_area * aspect)))  # noqa: RUF046
            h = int(round(math.sqrt(target_area / aspect)))  # noqa: RUF046
            if w <= width and h <= height:
                i = random.randint(0, height - h)
                return i, random.randint(0, width - w), h, w
        if width / height < 3 / 4:
            w, h = width, round(width / (3 / 4))
        elif width / height > 4 / 3:
            w, h = round(height * (4 / 3)), height
        else:
            w, h = width, height
        return (height - h) // 2, (width - w) // 2, h, w

    return (*box(), random.random() < 0.5)


def write_tinyvit(
    place: Path, truth: Truth, order: list[str], *, names: bool = False, ranks: int = 2
) -> Path:
    """TinyViT: an epoch per crop; every process has a shuffled share, one image in two of them.

    Boxes and flips of `truth` are replaced by what the seeds draw; seeds are added.
    """
    random = np.random.default_rng(0)
    crops = len(next(iter(truth.values()))["flip"])
    for entry in truth.values():
        H, W = entry["size"]
        entry["seed"] = random.integers(0, 2**31, crops).astype(np.int32)
        drawn = [timm_crop_and_flip(int(s), int(H), int(W)) for s in entry["seed"]]
        entry["box"] = np.array([d[:4] for d in drawn])
        entry["flip"] = np.array([d[4] for d in drawn])
    k = len(truth[order[0]]["ids"][0])
    for crop in range(crops):
        folder = place / f"logits_top{k}_epoch{crop}"
        folder.mkdir(parents=True)
        shares = np.array_split(random.permutation(len(order)), ranks)
        shares[-1] = np.append(shares[-1], shares[0][0])  # the sampler's padding
        for rank, share in enumerate(shares):
            keys, values = [], b""
            for index in share.tolist():
                entry = truth[order[index]]
                keys.append(Path(order[index]).stem if names else str(index))
                values += np.int32(entry["seed"][crop]).tobytes()
                values += entry["ids"][crop].astype(np.int16).tobytes()
                values += entry["prob"][crop].astype(np.float16).tobytes()
            (folder / f"rank{rank}-keys.txt").write_text("".join(f"{key}\n" for key in keys))
            (folder / f"rank{rank}-values.bin").write_bytes(values)
    return place


def read_tinyvit(place: Path, key: str, k: int, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
    """As TinyViT's reader does: seek by the key's line, then seed, classes, probabilities."""
    folder = place / f"logits_top{k}_epoch{epoch}"
    line = (folder / "rank0-keys.txt").read_text().splitlines().index(key)
    size = k * 2 * 2 + 4
    text = (folder / "rank0-values.bin").read_bytes()[line * size : (line + 1) * size]
    seed = int(np.frombuffer(text[:4], dtype=np.int32)[0])
    return (
        seed,
        np.frombuffer(text[4 : 4 + 2 * k], np.int16),
        np.frombuffer(text[4 + 2 * k :], np.float16),
    )


def make_maps(folder, *, cells: tuple[int, int], k: int, classes: int, dtype, seed=0) -> dict:
    """(2, K, H, W) per image: scores and classes, the best first in every cell."""
    random = np.random.default_rng(seed)
    maps = {}
    for key in folder.keys:
        ids = random.random((classes, *cells)).argsort(0)[:k]
        scores = -np.sort(-random.normal(3, 2, (k, *cells)), axis=0)
        maps[key] = torch.from_numpy(np.stack([scores, ids])).to(dtype)
    return maps


def pool_maps(map_2KHW, box, size, classes: int, *, transposed: bool) -> np.ndarray:
    """LabelPooling with torchvision: the dense map, RoI-align to one cell, softmax.

    The published code gives (top, left, bottom, right), as fractions, for (x1, y1, x2, y2).
    """
    from torchvision.ops import roi_align

    scores, ids = map_2KHW.double()
    dense = torch.zeros(1, classes, *scores.shape[1:], dtype=torch.float64)
    dense[0].scatter_(0, ids.long(), scores)
    (top, left, h, w), (H, W) = (float(v) for v in box), (float(v) for v in size)
    rows, columns = (top / H, (top + h) / H), (left / W, (left + w) / W)
    x, y = (rows, columns) if transposed else (columns, rows)
    across, down = dense.shape[3], dense.shape[2]
    corners = [x[0] * across, y[0] * down, x[1] * across, y[1] * down]
    boxes = torch.tensor([[0.0, *corners]], dtype=torch.float64)
    boxes[:, 1:] -= 0.5
    pooled = roi_align(dense, boxes, output_size=(1, 1))
    return torch.softmax(pooled.flatten(), 0).numpy()


def write_sre2l(place: Path, truth: Truth, order: list[str], *, batch: int, seed=42, mix=None):
    """SRe2L: an epoch per crop, batches in the order of a loader with a seeded sampler."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    sampler = torch.utils.data.RandomSampler(order, generator=generator)
    loader = torch.utils.data.DataLoader(range(len(order)), batch_size=batch, sampler=sampler)
    for epoch in range(len(truth[order[0]]["flip"])):
        (place / f"epoch_{epoch}").mkdir(parents=True)
        for number, indices in enumerate(loader):
            entries = [truth[order[i]] for i in indices.tolist()]
            sides = [np.tile(entry["size"], 2) for entry in entries]
            coords = [e["box"][epoch] / side for e, side in zip(entries, sides, strict=True)]
            state = [
                torch.from_numpy(np.stack(coords)).float(),
                torch.tensor([bool(entry["flip"][epoch]) for entry in entries]),
                *(mix or (None, None, None)),
                torch.from_numpy(np.stack([entry["logits"][epoch] for entry in entries])),
            ]
            torch.save(state, place / f"epoch_{epoch}" / f"batch_{number}.tar")
    return place
