"""Stored features against a live teacher: bytes per crop, reading, and the training step.

    python benchmarks/features.py [--quick] [--rounds 5]

The teacher is a ResNet-50 with random weights, the student a ResNet-18, on pieces of photographs at
64 pixels. Stored are whole vectors (2,048) and 512 components of a basis, in float16 and int8.

bytes     stored bytes per crop of the features, from `fkdpipe report`
read      milliseconds to open a window of features and read its batches, per batch of 64 crops, and
          relative to decoding and resizing the pixels of the same batch
loss      largest relative difference of a batch's loss from that with the live teacher, at the same
          weights
step      time of a KDEP step with the live teacher relative to that with stored features:
          interleaved rounds in one process, medians of the ratios within rounds
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import photographs
import timm
import torch

from fkdpipe.inspect.report import measure
from fkdpipe.labelgen import fit_basis, generate, plan
from fkdpipe.labelgen.fit_basis import FitSettings
from fkdpipe.labelgen.generate import Resources
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks import features, teachers, weight_files
from fkdpipe.networks.feature_layers import Needs
from fkdpipe.networks.models import parse_spec
from fkdpipe.networks.teachers import Teacher
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.store import Store, open_store
from fkdpipe.train import run, step
from fkdpipe.train.batch import Batch
from fkdpipe.train.settings import TrainSettings
from fkdpipe.train.state import Run

CPU = torch.device("cpu")
BATCH, CROPS, SIDE = 64, 8, 64


def kinds(components: int) -> dict[str, tuple[str, str]]:
    return {
        "whole_float16": ("pre", "float16"),
        f"pre{components}_float16": (f"pre:{components}", "float16"),
        f"pre{components}_int8": (f"pre:{components}", "int8"),
    }


def make_teacher(root: Path) -> tuple[str, Teacher]:
    torch.manual_seed(0)
    module = timm.create_model("resnet50", num_classes=10, zero_init_last=False)
    file = root / "teacher.safetensors"
    weight_files.write_export(file, module, {"size": [SIDE, SIDE], "interpolation": "bilinear"})
    text = f"resnet50={file}"
    (loaded,) = teachers.load_teachers(
        [parse_spec(text)], class_names=(), device=CPU, needs=Needs(pre=True)
    )
    return text, loaded


def make_stores(root: Path, data: Path, teacher: Teacher, components: int) -> dict[str, Store]:
    """Generate one store for each kind of features, and the basis."""
    resources = Resources(device=CPU, threads=common.cores())
    fit_settings = FitSettings(teacher="t", fraction=1.0, crops=CROPS)
    sample = fit_basis.from_folder(data, fit_settings)
    basis = root / "basis.safetensors"
    features.save_basis(basis, fit_basis.fit(sample, teacher, fit_settings, resources).basis)
    stores = {}
    for name, (text, code) in kinds(components).items():
        generation = GenerateSettings(
            teacher=("t",), source="t", form="none", features=(text,), features_code=code,
            basis=basis, crops=CROPS,
        )  # fmt: skip
        location = LocalLocation(root / name)
        planned = plan.prepare(location, data, generation, [teacher], device=CPU)
        generate.generate(planned, [teacher], resources)
        stores[name] = open_store(root / name)
        common.say(f"{name}: generated")
    return stores


def prepare(root: Path, data: Path, store: Store, teacher: str | None) -> Run:
    settings = TrainSettings(
        student="resnet18", size=SIDE, epochs=CROPS, batch_size=BATCH, teacher=teacher,
        method={"name": "kdep", "feature_weight": 1.0, "basis": str(root / "basis.safetensors")},
    )  # fmt: skip
    out = root / f"run-{Path(store.url).name}-{'online' if teacher else 'stored'}"
    return run.prepare(settings, data, out, store=store, cache_dir=root / "cache", device=CPU)


def read_seconds(prepared: Run, batches: list[Batch]) -> float:
    """Seconds per batch for reading features only, including opening of windows."""
    data, order = prepared.feed.data, prepared.feed.order
    assert data.features is not None
    begun = time.perf_counter()
    window = order.window(batches[0].passed, 0)
    opened = data.features.open(window.units, data.crops_of(window.passed))
    for first in range(0, len(window.rows), BATCH):
        opened(window.rows[first : first + BATCH])
    return (time.perf_counter() - begun) / -(-len(window.rows) // BATCH)


def step_seconds(prepared: Run, batch: Batch) -> float:
    begun = time.perf_counter()
    step.step(prepared, batch)
    return time.perf_counter() - begun


def pixel_seconds(prepared: Run, count: int) -> float:
    """Seconds per batch of the whole feed."""
    begun = time.perf_counter()
    for _, _batch in zip(range(count), prepared.crops.stream(), strict=False):
        pass
    return (time.perf_counter() - begun) / count


def loss(prepared: Run, batch: Batch) -> float:
    prepared.learner.train()
    with torch.no_grad():
        pixels, targets = step.prepare(prepared, batch)
        _, terms = prepared.learner(pixels, targets)
    return float(torch.stack([term.mean() for term in terms.values()]).sum())


def loss_difference(stored: Run, online: Run, batches: list[tuple[Batch, Batch]]) -> float:
    """Largest |stored / online - 1| of the losses, for the same crops and weights."""
    stored.learner.load_state_dict(online.learner.state_dict())
    return max(abs(loss(stored, ours) / loss(online, theirs) - 1) for ours, theirs in batches)


def compare(
    root: Path, data: Path, stores: dict[str, Store], teacher: str, rounds: int
) -> list[dict[str, Any]]:
    stored = {name: prepare(root, data, store, None) for name, store in stores.items()}
    online = prepare(root, data, stores["whole_float16"], teacher)
    runs = {**stored, "online": online}
    batches = {
        name: [b for _, b in zip(range(3), r.crops.stream(), strict=False)]
        for name, r in runs.items()
    }
    differences = {
        name: loss_difference(r, online, list(zip(batches[name], batches["online"], strict=True)))
        for name, r in stored.items()
    }
    for name, prepared in runs.items():
        step_seconds(prepared, batches[name][0])
    measures: dict[str, Callable[[], float]] = {}
    for name, prepared in runs.items():
        measures[f"step {name}"] = lambda r=prepared, b=batches[name][1]: step_seconds(r, b)
        if prepared is not online:
            measures[f"read {name}"] = lambda r=prepared, b=batches[name]: read_seconds(r, b)
            measures[f"feed {name}"] = lambda r=prepared: pixel_seconds(r, 3)
    times = common.interleaved(rounds, **measures)
    rows = []
    for name, store in stores.items():
        size = sum(
            field.bytes_per_crop
            for field_name, field in measure(store).fields.items()
            if field_name in ("value", "code", "scale")
        )
        read_s = statistics.median(times[f"read {name}"])
        rows.append(
            {
                "features": name,
                "bytes_per_crop": round(size, 1),
                "read_ms_per_batch": 1000 * read_s,
                "read_share_of_feed": read_s / statistics.median(times[f"feed {name}"]),
                "loss_difference": differences[name],
                "step_vs_online": common.median_ratio(times["step online"], times[f"step {name}"]),
            }
        )
    return rows


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=5, help="Number of interleaved rounds.")

    arguments = common.arguments(__doc__, add)
    count = 96 if arguments.quick else 512
    components = 512  # as many as the student has channels
    with tempfile.TemporaryDirectory(prefix="fkdpipe-features-") as folder:
        root = Path(folder)
        photographs.write_folder(root / "images", count)
        text, teacher = make_teacher(root)
        stores = make_stores(root, root / "images", teacher, components)
        rounds = 2 if arguments.quick else arguments.rounds
        rows = compare(root, root / "images", stores, text, rounds)
    names = (
        "bytes_per_crop", "read_ms_per_batch", "read_share_of_feed", "loss_difference",
        "step_vs_online",
    )  # fmt: skip
    figures = {name: {row["features"]: row[name] for row in rows} for name in names}
    common.finish("features", rows, figures, quick=arguments.quick)


if __name__ == "__main__":
    main()
