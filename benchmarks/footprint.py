"""Bytes per crop of every form at M = 200, counting every byte of the store.

For comparison: the FKD paper's Table 2, FKD's own files (`torch.save` of an image's crops, float32
and `--use_fp16`), and an entropy bound. The error of the code is given as total variation and
Kullback-Leibler divergence between the stored label and the exact one with the same K.

Two label sets. `simulated`: 1,000 classes, `benchmarks/simulated.py`; its statistics are checked
before the measurement. `demo`: a small network trained on the images of the demo (10 classes), with
labels written by `fkdpipe generate` and thinned to each form.

The bound is the length of an ideal code: for a box, the logarithm of the number of boxes that
its distribution allows in that image (sizes are uniform on their region); for a flip, one bit; for
kept classes, an adaptive model that has seen the image's earlier crops (the order of all but the
first is free); for probabilities, the entropy of the stored numbers at each of the K positions.
There is no bound for `full` and `logits`.
"""

from __future__ import annotations

import io
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import simulated
import torch
from simulated import Labels

from fkdpipe.commands import demo_data
from fkdpipe.inspect import report
from fkdpipe.pixels import crops
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import labels, schema, thin, writer
from fkdpipe.storage.labels import Form, parse_form
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.settings import LabelSettings
from fkdpipe.storage.store import Store, open_store

CROPS = 200
FORMS = ("hard", "topk:1", "topk:5", "topk:5:compact", "topk:10", "topk:10:compact")
DERIVED = ("hard", "topk:5", "topk:5:compact", "topk:10:compact")
PAPER = {
    "full": "full",
    "hard": "hard",
    "topk:1": "smoothing",
    "topk:5": "marginal-smoothing:5",
    "topk:5:compact": "marginal-smoothing:5",
    "topk:10": "marginal-smoothing:10",
    "topk:10:compact": "marginal-smoothing:10",
}
BETAS = (0.003, 0.01, 0.03)  # weight of a class not seen so far; the best value is used


def row_of(name: str, store: Store, form: Form, derived: bool) -> dict[str, Any]:
    """One row of the table for a measured store."""
    measured = report.measure(store)
    parts = {name: size.bytes_per_crop for name, size in measured.fields.items()}
    values = sum(parts.get(k, 0.0) for k in ("prob", "stick", "log_prob", "logit", "logit_max"))
    row: dict[str, Any] = {
        "form": f"{form}{' derived' if derived else ''}",
        "labels": name,
        "bytes_per_crop": round(measured.bytes_per_crop, 3),
        "box": round(parts.get("box", 0.0), 3),
        "flip": round(parts.get("flip", 0.0), 3),
        "ids": round(parts.get("ids", 0.0), 3),
        "values": round(values, 3),
        "lists_and_records": round(parts["images"] + parts["commits"], 3),
        "imagenet_gb": round(measured.imagenet / 1e9, 3),
    }
    if str(form) in PAPER:
        paper = report.PAPER_TABLE_2[PAPER[str(form)]]
        row["paper_gb"] = paper / 1e9
        row["smaller_vs_paper"] = round(paper / measured.imagenet, 2)
    return row


def fkd_bytes_per_crop(made: Labels, form: Form, *, half: bool) -> float:
    """Mean size of FKD's file of an image, per crop."""
    total = 0
    for index in range(min(64, made.images)):
        box, flip, kept = simulated.fkd_state(made, index, form.k)
        if form.kind == "hard":
            kept = kept[:, 0, 0].astype(np.int64)
        elif form.k == 1:
            kept = kept[:, :, 0]
        state = [box, flip, kept]
        if half:
            state = [a if a.dtype == bool else a.astype(np.float16) for a in state]
        file = io.BytesIO()
        torch.save(state, file)
        total += len(file.getvalue())
    return total / (min(64, made.images) * made.crops)


def label_error(form: Form, prob_BK: np.ndarray, classes: int) -> dict[str, float]:
    """Total variation and KL (nats) of stored from exact labels of the same K, B crops.

    The other C - K classes share the rest evenly in both, so they count as one class.
    """
    if form.kind == "hard":
        return {"tv_mean": 0.0, "tv_max": 0.0, "kl_mean": 0.0, "kl_max": 0.0}
    exact = prob_BK.astype(np.float64)
    stored = labels.decode_probabilities(form, labels.encode_probabilities(form, prob_BK))
    stored = stored.astype(np.float64)
    if form.k < classes:
        exact, stored = (np.c_[p, np.maximum(1 - p.sum(1), 0)] for p in (exact, stored))
    return _distances(exact, stored / stored.sum(1, keepdims=True))


def full_error(form: Form, prob_BC: np.ndarray) -> dict[str, float]:
    stored = labels.softmax(labels.encode_scores(np.log(np.maximum(prob_BC, 1e-38))))
    exact = prob_BC.astype(np.float64)
    exact /= exact.sum(1, keepdims=True)
    return _distances(exact, stored.astype(np.float64))


def _distances(exact: np.ndarray, stored: np.ndarray) -> dict[str, float]:
    tv = 0.5 * np.abs(exact - stored).sum(1)
    ratio = np.log(np.maximum(exact, 1e-300) / np.maximum(stored, 1e-12))
    kl = np.where(exact > 0, exact * ratio, 0.0).sum(1)
    return {
        "tv_mean": _short(tv.mean()), "tv_max": _short(tv.max()),
        "kl_mean": _short(kl.mean()), "kl_max": _short(kl.max()),
    }  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.2g}")


def box_bytes(size_N2: np.ndarray, keys: list[str]) -> float:
    """Entropy of a box in bytes: size and position are uniform on their regions."""
    distribution = CropDistribution()
    drawn = crops.sample(
        distribution,
        seed=0,
        image_id_N=crops.image_ids(keys),
        size_N2=size_N2,
        crops_M=np.arange(CROPS),
    )
    bits = 0.0
    for (height, width), box_M4 in zip(size_N2.astype(int), drawn.box_NM4, strict=True):
        h, w = np.arange(1, height + 1)[:, None], np.arange(1, width + 1)[None]
        area, ratio = h * w / (height * width), w / h
        fits = (area >= distribution.scale[0]) & (area <= distribution.scale[1])
        fits &= (ratio >= distribution.ratio[0]) & (ratio <= distribution.ratio[1])
        rooms = (height - box_M4[:, 2] + 1.0) * (width - box_M4[:, 3] + 1.0)
        bits += math.log2(fits.sum()) + np.log2(rooms).mean()
    return bits / len(keys) / 8


def ids_bytes(ids_NMK: np.ndarray, classes: int) -> float:
    """Ideal code length of the kept classes, given the image's earlier crops; see above."""
    return min(_adaptive_bits(ids_NMK, classes, beta) for beta in BETAS) / 8


def _adaptive_bits(ids_NMK: np.ndarray, classes: int, beta: float) -> float:
    images, crops_M, kept = ids_NMK.shape
    every = np.arange(images)
    first_NC = np.full((images, classes), beta)
    other_NC = np.full((images, classes), beta)
    bits = 0.0
    for crop in range(crops_M):
        free = other_NC.sum(1)
        top = ids_NMK[:, crop, 0]
        bits -= np.log2(first_NC[every, top] / first_NC.sum(1)).sum()
        free -= other_NC[every, top]
        for place in range(1, kept):
            weight = other_NC[every, ids_NMK[:, crop, place]]
            bits -= np.log2(weight / free).sum()
            free -= weight
        first_NC[every, top] += 1
        for place in range(1, kept):
            other_NC[every, ids_NMK[:, crop, place]] += 1
    return bits / (images * crops_M) - math.log2(math.factorial(kept - 1))


def value_bytes(stored_BK: np.ndarray) -> float:
    """Entropy of the stored numbers at each position, with the Miller-Madow correction."""
    bits = 0.0
    for column in stored_BK.view(f"u{stored_BK.dtype.itemsize}").T:
        counts = np.unique(column, return_counts=True)[1]
        p = counts / counts.sum()
        bits -= (p * np.log2(p)).sum() - (len(counts) - 1) / (2 * counts.sum() * math.log(2))
    return bits / 8


def bound(form: Form, derived: bool, box: float, ids_NMK: np.ndarray, prob_NMK: np.ndarray,
          classes: int) -> float:  # fmt: skip
    """Bytes per crop of the bound; ids and probabilities in descending order of probability."""
    some = ids_NMK[:256, :, : form.k]
    total = ids_bytes(some, classes) + (0.0 if derived else box + 1 / 8)
    if form.kind == "topk":
        k = form.k
        _, prob = labels.hybrid_order(
            ids_NMK[..., :k].reshape(-1, k), prob_NMK[..., :k].reshape(-1, k)
        )
        total += value_bytes(labels.encode_probabilities(form, prob))
    return round(total, 3)


def simulated_rows(root: Path, images: int) -> Iterator[dict[str, Any]]:
    made = simulated.simulate(images, CROPS)
    simulated.check(made)
    common.say(f"simulated labels, {images} images: {made.statistics}")
    box = box_bytes(made.size_N2[:64], simulated.columns(made).keys[:64])
    flat = made.prob_NMK.reshape(-1, simulated.KEPT)[:50_000]
    for text, derived in [*((f, False) for f in FORMS), *((f, True) for f in DERIVED)]:
        form = parse_form(text)
        place = root / f"{text}-{derived}"
        row = row_of(
            "simulated", simulated.make_store(place, made, form, derived=derived), form, derived
        )
        row["bound"] = bound(form, derived, box, made.ids_NMK, made.prob_NMK, simulated.CLASSES)
        row["fkd_files"] = round(fkd_bytes_per_crop(made, form, half=False), 2)
        row["fkd_files_fp16"] = round(fkd_bytes_per_crop(made, form, half=True), 2)
        yield row | label_error(form, flat[:, : form.k], simulated.CLASSES)
    few = simulated.simulate(128, CROPS, sample=128 * CROPS)
    for text in ("full", "logits"):
        yield row_of(
            "simulated", wide_store(root / text, few, parse_form(text)), parse_form(text), False
        ) | full_error(parse_form(text), few.sample_SC)


def wide_store(place: Path, made: Labels, form: Form) -> Store:
    """A store with one small unit of all scores, which suffices as they are not compressed."""
    store = writer.create_store(LocalLocation(place), simulated.columns(made), seed=0, unit=128)
    boxes = writer.add_crops(store, CropDistribution(), seed=0, count=made.crops)
    teachers = ({"name": "simulated"},)
    settings = LabelSettings(form, simulated.CLASSES, made.crops, teachers=teachers)
    fields = schema.label_fields(form, simulated.CLASSES)
    taught = writer.add_part(store, "rounds/0/labels/t", settings, fields)
    scores = np.log(np.maximum(made.sample_SC, 1e-38))
    top = scores.max(1)
    shape = (made.images, made.crops)
    if form.kind == "full":
        values = {"log_prob": labels.encode_scores(scores).reshape(*shape, -1)}
    else:
        kept = labels.encode_scores(scores - top[:, None]).reshape(*shape, -1)
        values = {"logit": kept, "logit_max": top.reshape(shape)}
    simulated.fill(store, boxes, taught, 0, values)
    for part in (boxes, taught):
        assert writer.seal(store, part)
    return store


def demo_rows(root: Path, pictures: int, epochs: int) -> Iterator[dict[str, Any]]:
    data, store = root / "data", root / "demo-full"
    demo_data.make_images(data, count=pictures)
    _fkdpipe("train", data, "--student", demo_data.TEACHER, "--target", "ground-truth",
             "--size", "32",
             "--epochs", epochs, "--batch-size", "64", "--crops-per-image", "4", "--lr", "0.003",
             "--set", "optimizer.name=adamw", "--set", "crop.flip=0.0", "--set",
             "crop.scale=[0.25,1.0]", "--out", root / "teacher")  # fmt: skip
    _fkdpipe("generate", data, store, "--teacher", root / "teacher", "--form", "full", "--crops",
             CROPS, "--source", "demo")  # fmt: skip
    opened = open_store(store)
    prob = _all_probabilities(opened)
    classes = prob.shape[-1]
    top1 = prob.max(-1)
    common.say(
        f"demo teacher: {opened.num_images} images, {classes} classes, median top-1 "
        f"{np.median(top1):.3f}, p10 {np.quantile(top1, 0.1):.3f}, p90 {np.quantile(top1, 0.9):.3f}"
    )
    yield row_of("demo", opened, parse_form("full"), False) | full_error(
        parse_form("full"), prob.reshape(-1, classes)
    )
    ids = np.argsort(-prob, axis=-1, kind="stable")
    ranked = np.take_along_axis(prob, ids, -1)
    box = box_bytes(opened.images.size_N2[:64], list(opened.images.keys[:64]))
    for text, derived in [*((f, False) for f in FORMS), ("topk:5:compact", True)]:
        form = parse_form(text)
        wanted = thin.Subset(form=form, derived_boxes=derived)
        place = LocalLocation(root / f"demo-{text}-{derived}")
        row = row_of("demo", thin.thin(opened, place, wanted), form, derived)
        row["bound"] = bound(form, derived, box, ids, ranked, classes)
        flat = ranked[..., : form.k].reshape(-1, form.k)
        yield row | label_error(form, flat, classes)


def _all_probabilities(store: Store) -> np.ndarray:
    """float32 (N, M, C) of a `full` store, in plain Zarr."""
    import zarr

    scores = zarr.open_array(store=store.url, path="rounds/0/labels/demo/log_prob", mode="r")[:]
    return labels.softmax(scores.reshape(-1, scores.shape[-1])).reshape(scores.shape)


def _fkdpipe(*words: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "fkdpipe", *map(str, words)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def main() -> None:
    options = common.arguments(__doc__)
    images, pictures, epochs = (1024, 150, 4) if options.quick else (4096, 500, 15)
    with tempfile.TemporaryDirectory(prefix="fkdpipe-footprint-") as folder:
        rows = list(simulated_rows(Path(folder), images))
        rows += demo_rows(Path(folder), pictures, epochs)
    found = {row["form"]: row["bytes_per_crop"] for row in rows if row["labels"] == "simulated"}
    figures = {
        "bytes_per_crop": {
            "hard": found["hard"],
            "topk5_float16": found["topk:5"],
            "topk5_compact": found["topk:5:compact"],
            "topk10_compact": found["topk:10:compact"],
            "topk5_compact_derived": found["topk:5:compact derived"],
        }
    }
    common.finish("footprint", rows, figures, quick=options.quick)


if __name__ == "__main__":
    main()
