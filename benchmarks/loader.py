"""LabelledCrops in a loop of one's own against `fkdpipe train`; the size of its state; importing.

    python benchmarks/loader.py [--quick] [--rounds 7]

512 JPEGs of about 500 x 375 pixels cut from real photographs, 16 crops of each with top-5 labels of
1,000 classes, batches of 128 crops at 64 px, m = 4, two threads, a tiny student and SGD on both
sides. Rounds of some steps take turns in one process.

plain loop  ten lines over `LabelledCrops`: forward, soft cross-entropy, backward, step
train       the same steps by the trainer of `fkdpipe train`
state       bytes of `LabelledCrops.state_dict()` as JSON, in the middle of an epoch
import      seconds of `import fkdpipe` in a new process, beside Python's own start; least of ten
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import feed
import photographs
import timm
import torch

import fkdpipe
from fkdpipe import LabelledCrops, losses
from fkdpipe.storage.store import Store
from fkdpipe.train import loop, run
from fkdpipe.train.settings import OptimizerSettings, TrainSettings

SIZE, BATCH, M, THREADS, TARGET = 64, 128, 4, 2, f"marginal-smoothing:{feed.K}"
STUDENT, LR = "test_resnet", 0.02


def plain_loop(store: Store, images: Path, cache: Path) -> tuple[LabelledCrops, Callable[[], None]]:
    """The dataset, and what takes one step."""
    crops = LabelledCrops(
        store, images, target=TARGET, size=SIZE, batch_size=BATCH, crops_per_image=M,
        threads=THREADS, device="cpu", cache=cache,
    )  # fmt: skip
    torch.manual_seed(0)
    student = timm.create_model(STUDENT, num_classes=crops.num_classes).train()
    student = student.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), LR, momentum=0.9, weight_decay=1e-4)

    def steps() -> Any:
        while True:
            for batch in crops:
                loss = losses.soft_cross_entropy(student(batch.pixels), batch.labels).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                float(loss.detach())  # the trainer looks at every loss on the CPU, too
                yield

    endless = steps()
    return crops, lambda: next(endless)


def trainer(store: Store, images: Path, root: Path) -> Callable[[], None]:
    """What takes one step of `fkdpipe train`, with its bookkeeping."""
    settings = TrainSettings(
        student=STUDENT, target=TARGET, size=SIZE, batch_size=BATCH, crops_per_image=M,
        epochs=4000, threads=THREADS, optimizer=OptimizerSettings(lr=LR),
    )  # fmt: skip
    prepared = run.prepare(
        settings, images, root / "run", store=store, cache_dir=root / "cache",
        device=torch.device("cpu"),
    )  # fmt: skip
    batches = prepared.crops.stream()
    meter = loop.Meter(prepared.device)

    def step() -> None:
        loop._train_step(prepared, next(batches), meter)

    return step


def images_per_s(step: Callable[[], None], steps: int) -> float:
    step()  # what was read ahead while the other side ran
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    return steps * BATCH / M / (time.perf_counter() - begun)


def start_seconds(code: str) -> float:
    """Of a new Python process that runs `code`, the least of ten."""
    taken = []
    for _ in range(10):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        taken.append(time.perf_counter() - begun)
    return min(taken)


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=7)

    asked = common.arguments(__doc__, add)
    torch.set_num_threads(1)
    rounds, steps = (2, 4) if asked.quick else (asked.rounds, 20)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        photographs.write_folder(root / "data", 128 if asked.quick else 512)
        store = feed.make_store(root, root / "data")
        crops, one = plain_loop(store, root / "data", root / "cache")
        other = trainer(store, root / "data", root)
        rates = common.interleaved(
            rounds + 1,
            plain=lambda: images_per_s(one, steps),
            train=lambda: images_per_s(other, steps),
        )
        state = json.dumps(crops.state_dict())
        crops.close()
    rates = {name: values[1:] for name, values in rates.items()}  # the first round warms up
    bare = start_seconds("pass")
    figures = {
        "loader_vs_train": common.median_ratio(rates["plain"], rates["train"]),
        "state_bytes": len(state),
        "import_seconds": start_seconds(f"import {fkdpipe.__name__}") - bare,
    }
    rows = [{"what": name, "images/s": statistics.median(v)} for name, v in rates.items()]
    rows += [{"what": "python -c pass", "seconds": bare}]
    rows += [{"what": "import fkdpipe", "seconds": figures["import_seconds"]}]
    common.finish("loader", rows, figures, quick=asked.quick)


if __name__ == "__main__":
    main()
