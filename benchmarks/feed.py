"""The feed against the alternatives of a user, on two CPU cores.

    python benchmarks/feed.py [--quick] [--rounds 7]

512 JPEGs of about 500 x 375 pixels cut from real photographs, 224 px, top-5 labels of 1,000
classes, batches of 128 crops. Interleaved rounds in one process; ratios are taken
within a round, with medians over the rounds. All sides use two threads or workers.

ours        `Feed`: labels and boxes from a store, uint8 batches in torch, as sent to a device
ours float  the same, then normalised to float32 on the CPU
fkd loader  written for this benchmark in the style of FKD's: a torch DataLoader with two workers,
            Pillow + torchvision, `torch.load` of one label file per image, float batches. Its files
            hold as many crops as the store (16); FKD's hold 500 and take longer to read.
decode      torchvision's JPEG decoder on the same files in two threads, without any other work
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
import photographs
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from fkdpipe.common.distributed import Rank
from fkdpipe.labelgen import generate, plan
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks import teachers, weight_files
from fkdpipe.networks.models import ModelSpec
from fkdpipe.pixels.replay import View, cpu, normalise
from fkdpipe.storage import labels, rounds
from fkdpipe.storage.labels import Target
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.store import Store
from fkdpipe.train import data as training_data
from fkdpipe.train.feed import Feed
from fkdpipe.train.order import Order
from fkdpipe.train.schedule import Pass, Stage

CPU = torch.device("cpu")
Batches = Iterator[tuple[torch.Tensor, Any]]
SIZE, BATCH, THREADS, CROPS, K = 224, 128, 2, 16, 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WARM = 6  # untimed batches at both ends: more than any side reads ahead
WIDTHS = (1, 2, 4, 8)


def make_store(workdir: Path, data: Path) -> Store:
    """Generate a real store: a tiny network of 1,000 classes labels 16 crops of every image."""
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=1000).eval()
    file = workdir / "teacher.safetensors"
    shape = {"student": "test_resnet", "size": [64, 64], "interpolation": "bilinear"}
    weight_files.write_export(file, module, shape)
    loaded = teachers.load_teachers(
        [ModelSpec("test_resnet", "timm", file)], class_names=(), device=CPU
    )
    settings = GenerateSettings(teacher=("t",), crops=CROPS, source="t", form=f"topk:{K}")
    planned = plan.prepare(LocalLocation(workdir / "store"), data, settings, loaded, device=CPU)
    generate.generate(planned, loaded, generate.Resources(device=CPU, batch=256))
    return planned.store


def write_label_files(store: Store, workdir: Path) -> list[tuple[str, Path]]:
    """Write one file per image in FKD's format; return a list of (key, file).

    A file has crops as fractions of the image, flips, and the kept classes and probabilities as
    float32 (crops, 2, K).
    """
    import zarr

    def read(name: str) -> np.ndarray:
        path = f"rounds/0/labels/t/{name}"
        return np.asarray(zarr.open_array(store=store.url, path=path, mode="r")[:])

    part = store.rounds()[0]
    form = labels.parse_form(f"topk:{K}")
    ids = read("ids").astype(np.float32)
    prob = labels.decode_probabilities(form, read("prob").reshape(-1, K)).reshape(ids.shape)
    workdir.mkdir()
    listed = []
    for unit in range(store.num_units):
        drawn = rounds.crops_of(store, part, unit)
        rows = store.unit_rows(unit)
        for local, row in enumerate(range(rows.start, rows.stop)):
            height, width = store.images.size_N2[row].tolist()
            scale = np.array([height, width, height, width], dtype=np.float32)
            state = [
                torch.from_numpy(drawn.box_NM4[local] / scale),
                torch.from_numpy(drawn.flip_NM[local].copy()),
                torch.from_numpy(np.stack([ids[row], prob[row]], axis=1)),
            ]
            file = workdir / f"{row}.tar"
            torch.save(state, file)
            listed.append((str(store.images.keys[row]), file))
    return listed


class FkdImages(Dataset):
    """m random crops of an image with their labels, using Pillow."""

    def __init__(self, root: Path, listed: list[tuple[str, Path]], m: int) -> None:
        self.root, self.listed, self.m = root, listed, m

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        key, file = self.listed[index]
        coords, flips, soft = torch.load(file)
        chosen = torch.randperm(len(flips))[: self.m]
        with Image.open(self.root / key) as opened:
            image = opened.convert("RGB")
        pixels = []
        for k in chosen.tolist():
            top, left, height, width = (
                coords[k].double() * torch.tensor([image.height, image.width] * 2)
            ).round().int().tolist()  # fmt: skip
            crop = functional.resized_crop(image, top, left, height, width, [SIZE, SIZE])
            if flips[k]:
                crop = functional.hflip(crop)
            pixels.append(functional.normalize(functional.to_tensor(crop), MEAN, STD))
        return torch.stack(pixels), soft[chosen]


def endless(count: int) -> Iterator[int]:
    while True:
        yield from torch.randperm(count).tolist()


def fkd_loader(root: Path, listed: list[tuple[str, Path]], m: int, batches: int) -> Batches:
    images = batches * BATCH // m
    loader = DataLoader(
        FkdImages(root, listed, m),
        batch_size=BATCH // m,
        sampler=list(itertools.islice(endless(len(listed)), images)),
        num_workers=THREADS,
    )
    for pixels, soft in loader:
        yield pixels.flatten(0, 1), soft.flatten(0, 1)


def our_feed(data: training_data.TrainingSet, m: int, batches: int, *, as_float: bool) -> Batches:
    order = Order(
        data.rows,
        unit_size=data.unit_size,
        window=8,
        stages=[Stage(Pass(0, 0, m, 0), 10_000)],
        batch_size=BATCH,
        seed=0,
    )
    feed = Feed(
        data, order, [View((SIZE, SIZE))], backend="cpu", threads=THREADS, device=CPU, rank=Rank()
    )
    for batch in itertools.islice(feed.stream(), batches):
        pixels = batch.views[0]
        yield normalise(pixels, MEAN, STD) if as_float else pixels, batch.values


def run_through(stream: Iterator[Any], batches: int) -> tuple[float, float]:
    """(crops per second, CPU milliseconds of all processes per crop).

    The rate is measured in the middle of the stream, so that read-ahead has no effect. CPU time
    does not depend on other load of the machine.
    """
    begun = ended = 0.0
    spent = cpu_seconds()
    for k, _ in enumerate(stream):
        if k == WARM:
            begun = time.perf_counter()
        if k == batches - WARM:
            ended = time.perf_counter()
    spent = cpu_seconds() - spent
    return (batches - 2 * WARM) * BATCH / (ended - begun), 1e3 * spent / (batches * BATCH)


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished workers."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def decode_per_s(files: list[bytes], size_N2: np.ndarray, count: int) -> float:
    sizes = [tuple(size) for size in size_N2.tolist()]
    with ThreadPoolExecutor(THREADS) as pool:
        begun = time.perf_counter()
        for _ in range(count):
            list(pool.map(cpu.decode, files, sizes))
        return count * len(files) / (time.perf_counter() - begun)


def parts_of_an_image(
    data: training_data.TrainingSet, files: list[bytes], m: int
) -> dict[str, float]:
    """Milliseconds of one thread per image for each part, as the minimum of several runs."""
    target = View((SIZE, SIZE))
    crops_m = np.arange(m)
    box = data.crops(data.rows, crops_m).box_NM4
    some = range(0, len(data.rows), 4)
    sizes = [tuple(size) for size in data.size_N2[data.rows].tolist()]
    boxes = [[tuple(b) for b in per_image] for per_image in box.tolist()]
    cut = [cpu._crops(files[k], sizes[k], boxes[k]) for k in some]
    out = torch.empty((1, SIZE, SIZE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    kernel = cpu._KERNELS[target.interpolation]

    def resize() -> None:
        for image in cut:
            for crop in image:
                kernel(crop[None], [SIZE, SIZE], False, out=out)

    def decode() -> None:
        for k in some:
            cpu._crops(files[k], sizes[k], boxes[k])

    def take_labels() -> None:
        assert data.labels is not None
        data.labels.open([0], crops_m)(data.rows[:: len(sizes) // len(some)])
        data.crops(data.rows[:: len(sizes) // len(some)], crops_m)

    return {
        f"{name} ms": least(work) / len(some)
        for name, work in (("decode", decode), ("resize", resize), ("labels", take_labels))
    }


def least(work: Callable[[], None]) -> float:
    """Minimum CPU time of five calls, in milliseconds."""
    taken = []
    for _ in range(5):
        begun = time.process_time()
        work()
        taken.append(1e3 * (time.process_time() - begun))
    return min(taken)


def measure(workdir: Path, *, images: int, rounds_: int, batches: int) -> tuple[list[dict], dict]:
    pixels = photographs.write_folder(workdir / "data", images)
    store = make_store(workdir, workdir / "data")
    listed = write_label_files(store, workdir / "labels")
    target = Target("marginal-smoothing", K)
    data = training_data.from_store(
        store, workdir / "data", target=target, source=None, temperature=None,
        cache_dir=workdir / "cache",
    )  # fmt: skip
    files = [str(data.root / key).encode() for key in data.keys]
    seen: dict[tuple[str, int], list[float]] = {}  # images per second
    cpu_ms: dict[tuple[str, int], list[float]] = {}  # per image
    for _ in range(rounds_):
        for m in WIDTHS:
            streams = {
                "ours": our_feed(data, m, batches, as_float=False),
                "fkd loader": fkd_loader(data.root, listed, m, batches),
                "ours float": our_feed(data, m, batches, as_float=True),
            }
            for name, stream in streams.items():
                rate, spent = run_through(stream, batches)
                seen.setdefault((name, m), []).append(rate / m)
                cpu_ms.setdefault((name, m), []).append(spent * m)
            spent = cpu_seconds()
            seen.setdefault(("decode", m), []).append(decode_per_s(files, data.size_N2, 2))
            spent = 1e3 * (cpu_seconds() - spent) / (2 * len(files))
            cpu_ms.setdefault(("decode", m), []).append(spent)
    return tabulate(seen, cpu_ms, data, files), {
        **{
            f"feed_vs_fkd_loader_m{m}": common.median_ratio(seen["ours", m], seen["fkd loader", m])
            for m in WIDTHS
        },
        "feed_vs_decode_m1": common.median_ratio(seen["ours", 1], seen["decode", 1]),
        "float_vs_fkd_loader_m1": common.median_ratio(seen["ours float", 1], seen["fkd loader", 1]),
        **{
            f"cpu_vs_fkd_loader_m{m}": common.median_ratio(
                cpu_ms["fkd loader", m], cpu_ms["ours", m]
            )
            for m in WIDTHS
        },
        "pixels_per_image": round(pixels),
    }


def tabulate(
    seen: dict[tuple[str, int], list[float]],
    cpu_ms: dict[tuple[str, int], list[float]],
    data: training_data.TrainingSet,
    files: list[bytes],
) -> list[dict]:
    """One row per side and m: images/s, crops/s, the ratio, and the parts of the feed's time."""
    rows = []
    for m in WIDTHS:
        parts = parts_of_an_image(data, files, m)
        for name in ("ours", "ours float", "fkd loader", "decode"):
            rate = statistics.median(seen[name, m])
            row = {"side": name, "m": m, "images/s": rate, "crops/s": rate * m,
                   "of fkd loader": common.median_ratio(seen[name, m], seen["fkd loader", m]),
                   "of decode": common.median_ratio(seen[name, m], seen["decode", m])}  # fmt: skip
            row["cpu ms"] = statistics.median(cpu_ms[name, m])
            if name == "ours":  # the rest is Python and hand-over between threads
                row |= {**parts, "rest ms": row["cpu ms"] - sum(parts.values())}
            rows.append(row)
    return rows


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=7)

    asked = common.arguments(__doc__, add)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as workdir:
        rows, figures = measure(
            Path(workdir),
            images=128 if asked.quick else 512,
            rounds_=2 if asked.quick else asked.rounds,
            batches=2 * WARM + (6 if asked.quick else 16),
        )
    common.finish("feed", rows, figures, quick=asked.quick)


if __name__ == "__main__":
    main()
