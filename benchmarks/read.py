"""Speed and memory of reading a store.

    narrow     the trainer's path at m = 4, K = 5: boxes and labels of a batch from the local cache,
               in the trainer's order; against `torch.load` of FKD's per-image files with four
               random crops each, as in its loader. Both with a warm page cache
    hydration  filling that cache from the store, M = 200; a later start only compares checksums
    wide       1,000 log-probabilities per crop, streamed with m = g: a pass reads one crop group of
               every image; against a plain sequential read of the same files, both cold

The ratios compare interleaved rounds of one run. Memory is the increase of the resident set during
the phase; `private` is the part not backed by files, which is the memory that is really needed.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
import simulated
import torch
from simulated import Labels

from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import labels, reader, schema, writer
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.settings import LabelSettings
from fkdpipe.storage.store import Store, open_store
from fkdpipe.train.order import Order
from fkdpipe.train.schedule import Pass, Stage

CROPS, M, K = 200, 4, 5
WINDOW = 8  # units read together, as the trainer does
BATCH_IMAGES = 64
WIDE_CROPS = 16
TARGET = labels.Target("marginal-smoothing", K)


def repeated(made: Labels, times: int) -> Labels:
    """More images with the same labels: faster than simulating, and equal for the readers."""
    return Labels(
        np.tile(made.ids_NMK, (times, 1, 1)),
        np.tile(made.prob_NMK, (times, 1, 1)),
        made.sample_SC,
        np.tile(made.size_N2, (times, 1)),
        made.statistics,
    )


def memory_of(work: Callable[..., None], *paths: Path) -> dict[str, float]:
    """Increase of the resident set and its private part while `work` runs in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_watched, work, *paths).result()


def _watched(work: Callable[..., None], *paths: Path) -> dict[str, float]:
    common.reset_peak()
    before, private = common.peak_bytes(), common.resident_bytes()
    highest = private
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, common.resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    work(*paths)
    done.set()
    thread.join()
    return {
        "peak_mb": round((common.peak_bytes() - before) / 1e6, 1),
        "private_mb": round((highest - private) / 1e6, 1),
    }


def fill_cache(store_path: Path, cache_dir: Path) -> None:
    open_readers(open_store(store_path), cache_dir)


def train_epoch(store_path: Path, cache_dir: Path) -> None:
    """Read all images of the store through the trainer's path."""
    store = open_store(store_path)
    trainer_reads(store, *open_readers(store, cache_dir), store.num_images)()


def stream(store_path: Path) -> None:
    """Read one pass of a wide store."""
    store = open_store(store_path)
    found = reader.finished(store, [("labels", "w", "")])
    streamed = reader.WideReader(store, found.labels[0], "log_prob")
    for first in range(0, store.num_units, WINDOW):
        units = range(store.num_units)[first : first + WINDOW]
        streamed.units(units, np.arange(store.group_size))


def open_readers(store: Store, cache_dir: Path) -> tuple[reader.CropReader, reader.SparseReader]:
    found = reader.finished(store, [("labels", "simulated", "")])
    return (
        reader.CropReader(store, found.crops, cache_dir),
        reader.SparseReader(store, found.labels[0], cache_dir),
    )


def trainer_reads(
    store: Store, boxes: reader.CropReader, sparse: reader.SparseReader, images: int
) -> Callable[[], float]:
    """Images per second of the trainer's path, with `images` images per call, pass after pass."""
    order = Order(
        np.arange(store.num_images),
        unit_size=store.unit_size,
        window=8,
        stages=[Stage(Pass(0, 0, M, 0), 50)],
        batch_size=BATCH_IMAGES * M,
        seed=0,
    )
    steps = order.steps()

    def turn() -> float:
        begun = time.perf_counter()
        for _ in range(images // BATCH_IMAGES):
            for piece in next(steps).pieces:
                crops_m = (piece.window.passed.first_crop + np.arange(M)) % CROPS
                boxes.take(piece.rows, crops_m)
                sparse.take(piece.rows, crops_m, TARGET)
        return images / (time.perf_counter() - begun)

    return turn


def write_fkd(folder: Path, made: Labels, images: int) -> None:
    folder.mkdir()
    for row in range(images):
        torch.save(simulated.fkd_state(made, row, K), folder / f"{row}.tar")


def fkd_reads(folder: Path, files: int, images: int) -> Callable[[], float]:
    """Images per second of FKD's loader: load the file of an image, select m random crops."""
    random = np.random.default_rng(0)

    def turn() -> float:
        chosen = random.integers(0, files, images)
        begun = time.perf_counter()
        for index in chosen:
            # The files contain pickled numpy arrays, just written by this script.
            coords, flips, kept = torch.load(folder / f"{index}.tar", weights_only=False)
            some = torch.randperm(len(coords))[:M].numpy()
            _ = coords[some], flips[some], kept[some]
        return images / (time.perf_counter() - begun)

    return turn


def narrow(root: Path, made: Labels, times: int, rounds: int) -> tuple[list[dict], dict]:
    form = labels.Form("topk", K)
    store = simulated.make_store(root / "large", repeated(made, times), form)
    few = simulated.make_store(root / "small", made, form)
    rates: dict[str, list[float]] = {"fill": [], "again": []}
    for turn in range(rounds):
        for found in rates.values():
            begun = time.perf_counter()
            boxes, sparse = open_readers(store, root / f"cache-{turn}")
            found.append(store.num_images / (time.perf_counter() - begun))
    write_fkd(root / "fkd", made, made.images)
    turns = common.interleaved(
        rounds + 2,
        ours=trainer_reads(store, boxes, sparse, 64 * 256),
        fkd=fkd_reads(root / "fkd", made.images, 512),
    )
    ratio = common.median_ratio(turns["ours"], turns["fkd"])
    store_path = Path(store.url)
    memory = [
        memory_of(fill_cache, Path(few.url), root / "memory-few"),
        memory_of(fill_cache, store_path, root / "memory-all"),
        memory_of(train_epoch, store_path, root / "memory-all"),
    ]
    fill, again, ours, fkd = (
        statistics.median(r) for r in (*rates.values(), turns["ours"], turns["fkd"])
    )
    rows = [
        {"what": f"hydration of {few.num_images:,} images", **memory[0]},
        {"what": f"hydration of {store.num_images:,} images", "images_per_s": fill, **memory[1]},
        {"what": "a later start: checksums of the cache", "images_per_s": again},
        {
            "what": f"trainer's path, m={M}, K={K}",
            "images_per_s": ours,
            "vs_torch_load": ratio,
            **memory[2],
        },
        {"what": "torch.load", "images_per_s": fkd},
    ]
    figures = {"read_vs_torch_load": round(ratio, 1), "hydration_images_per_s": round(fill)}
    return rows, figures


def make_wide(store_path: Path, units: int) -> Store:
    """A store of random log-probabilities; they are not compressed, so the values do not matter."""
    made = Labels(
        np.zeros((1024 * units, WIDE_CROPS, 1), dtype=np.int64),
        np.zeros((1024 * units, WIDE_CROPS, 1), dtype=np.float32),
        np.zeros((0, simulated.CLASSES), dtype=np.float32),
        np.full((1024 * units, 2), 400, dtype=np.uint16),
        {},
    )
    store = writer.create_store(
        LocalLocation(store_path), simulated.columns(made), seed=0, unit=1024
    )
    boxes = writer.add_crops(store, CropDistribution(), seed=0, count=WIDE_CROPS)
    form, teachers = labels.Form("full"), ({"name": "random"},)
    settings = LabelSettings(form, simulated.CLASSES, WIDE_CROPS, teachers=teachers)
    fields = schema.label_fields(form, simulated.CLASSES)
    taught = writer.add_part(store, "rounds/0/labels/w", settings, fields)
    random = np.random.default_rng(0)
    for unit in range(units):
        bits = random.integers(0, 2**14, (1024, WIDE_CROPS, simulated.CLASSES), dtype=np.uint16)
        simulated.fill(store, boxes, taught, unit, {"log_prob": bits.view(np.float16)})
    for part in (boxes, taught):
        assert writer.seal(store, part)
    return store


def forget(files: list[Path]) -> None:
    """Drop files from the page cache. The writer has already flushed them."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def wide(root: Path, units: int, rounds: int) -> tuple[list[dict], dict]:
    store = make_wide(root / "wide", units)
    found = reader.finished(store, [("labels", "w", "")])
    streamed = reader.WideReader(store, found.labels[0], "log_prob")
    field = found.labels[0][0].part.field("log_prob")
    path = found.labels[0][0].part.path
    groups = WIDE_CROPS // store.group_size
    read_bytes: list[int] = []
    count_reads(store, read_bytes)
    turns = {"ours": 0, "plain": 0}
    windows = [range(units)[k : k + WINDOW] for k in range(0, units, WINDOW)]

    def files_of(group: int) -> list[Path]:
        keys = [schema.shard_key(path, field, unit, group) for unit in range(units)]
        return [Path(store.url) / key for key in keys]

    def ours() -> float:
        group = turns["ours"] % groups
        turns["ours"] += 1
        forget(files_of(group))
        read_bytes.clear()
        crops_m = np.arange(store.group_size) + group * store.group_size
        begun = time.perf_counter()
        for window in windows:
            streamed.units(window, crops_m)
        seconds = time.perf_counter() - begun
        group_bytes = sum(file.stat().st_size for file in files_of(group))
        assert sum(read_bytes) == group_bytes, (sum(read_bytes), group_bytes)
        return group_bytes / seconds

    def plain() -> float:
        group = turns["plain"] % groups
        turns["plain"] += 1
        files = files_of(group)
        forget(files)
        begun = time.perf_counter()
        total = sum(len(file.read_bytes()) for file in files)
        return total / (time.perf_counter() - begun)

    row: dict[str, Any] = {"what": f"wide, m = g = {store.group_size}, cold"}
    rates = common.interleaved(rounds * groups, ours=ours, plain=plain)
    ratio = common.median_ratio(rates["ours"], rates["plain"])
    row |= memory_of(stream, Path(store.url))
    row |= {"mb_per_s": statistics.median(rates["ours"]) / 1e6, "vs_sequential_read": ratio}
    row["mb_per_unit"] = sum(read_bytes) / units / 1e6
    rows = [row, {"what": "sequential read", "mb_per_s": statistics.median(rates["plain"]) / 1e6}]
    figures = {
        "wide_vs_sequential_read": round(ratio, 2),
        "wide_bytes_read_vs_one_group": 1.0,  # asserted in every round
    }
    return rows, figures


def count_reads(store: Store, lengths: list[int]) -> None:
    """Record the length of every object that the store reads."""
    plain = store.location.read

    def read(key: str) -> bytes:
        data = plain(key)
        lengths.append(len(data))
        return data

    store.location.read = read  # type: ignore[method-assign]


def main() -> None:
    options = common.arguments(__doc__)
    torch.set_num_threads(1)
    times, units, rounds = (2, 2, 2) if options.quick else (16, 12, 5)
    with tempfile.TemporaryDirectory(prefix="fkdpipe-read-") as folder:
        made = simulated.simulate(1024, CROPS, sample=0)
        rows, figures = narrow(Path(folder), made, times, rounds)
        more, wide_figures = wide(Path(folder), units, rounds)
    rows += more
    figures |= wide_figures
    for name in ("peak_mb", "private_mb"):
        figures[name] = max(row[name] for row in rows if name in row)
    common.finish("read", rows, figures, quick=options.quick)


if __name__ == "__main__":
    main()
