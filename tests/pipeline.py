"""Short ways through the public functions, for tests of both phases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from conftest import CLASSES

from fkdpipe.cli import cli
from fkdpipe.common.distributed import Rank
from fkdpipe.labelgen import generate, plan
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks.teachers import Teacher
from fkdpipe.storage.location import open_location
from fkdpipe.storage.store import Store, open_store
from fkdpipe.train import loop, metrics, run
from fkdpipe.train.settings import OptimizerSettings, TrainSettings
from fkdpipe.train.state import Run

CPU = torch.device("cpu")


_GENERATE = {"teacher": ("test",), "crops": 4, "source": "t", "form": "topk:3"}


def make_store(
    place: Path,
    data: Path,
    teachers: Sequence[Teacher],
    *,
    batch: int = 16,
    rank: Rank = Rank(),
    threads: int = 2,
    **settings,
) -> Store:
    """`fkdpipe generate` with small numbers."""
    wanted = GenerateSettings(**{**_GENERATE, **settings})
    planned = plan.prepare(open_location(place), data, wanted, teachers, device=CPU, rank=rank)
    resources = generate.Resources(device=CPU, batch=batch, threads=threads, rank=rank)
    generate.generate(planned, teachers, resources)
    return open_store(place)


def train_settings(**changes) -> TrainSettings:
    """A tiny student for a few epochs."""
    defaults = {
        "student": "test_resnet",
        "target": "marginal-smoothing:3",
        "size": 32,
        "epochs": 4,
        "batch_size": 16,
        "crops_per_image": 2,
        "threads": 2,
        "log_every": 1,
        "optimizer": OptimizerSettings(name="sgd", lr=0.02),
    }
    return TrainSettings(**{**defaults, **changes})


def prepare_run(
    out: Path, data: Path, store: Store | None, settings: TrainSettings, **options
) -> Run:
    return run.prepare(
        settings,
        data,
        out,
        store=store,
        cache_dir=out.parent / "cache",
        device=CPU,
        **options,
    )


def train(out: Path, data: Path, store: Store | None, **changes) -> loop.Result:
    return loop.train(prepare_run(out, data, store, train_settings(**changes)))


def command_line(words: list[str]) -> None:
    """`fkdpipe ...`, for a process that a test starts and kills."""
    cli(words)


def arrays_of(store: Store) -> dict[str, np.ndarray]:
    """Every array of a store, read with plain zarr."""
    import zarr

    values = {}
    for part in store.parts.values():
        for field in part.fields:
            path = f"{part.path}/{field.name}"
            values[path] = zarr.open_array(store=store.url, path=path, mode="r")[...]
    return values


__all__ = [
    "CLASSES",
    "CPU",
    "arrays_of",
    "command_line",
    "make_store",
    "prepare_run",
    "train",
    "train_settings",
]


def stamps(store) -> dict[str, int]:
    """When each file of a store was last written."""
    root = store.location.root
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def unchanged(before: dict[str, int], store) -> bool:
    after = stamps(store)
    return all(after[key] == stamp for key, stamp in before.items())


def losses(out: Path) -> list[float]:
    """The loss of every step that a run logged."""
    return [x["last_loss"] for x in metrics.read(out / "metrics.jsonl") if x["kind"] == "train"]
