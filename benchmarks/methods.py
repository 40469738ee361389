"""All methods on one pair of networks: accuracy, step time, memory, auxiliary modules.

    python benchmarks/methods.py [--quick] [--seeds 3]

Scans of handwritten digits (scikit-learn) on plain backgrounds, at 32 px. The teacher, a small
Swin, is trained on 1,000 scans with eight backgrounds each; with the photographs of `accuracy.py`
it learns far too slowly (under 50 % in 1,800 steps). The student, a narrow ResNet-10, has one image
of each of 128 scans and the same number of epochs with every method. Methods use the settings of
their papers without further tuning. Accuracy is measured on the other 797 scans.

main      no distillation; KD, FitNet, SRD, DPK and ScaleKD with the live teacher; FKD with its
          stored labels
dpk       DPK with a teacher half as wide ("better teacher, better student")
scalekd   a linear projector instead of CAP, CAP with and without DFM and TPP, and the whole method
          with the map from the store, where only the tail of the teacher runs

step_over_none: time of a step (teacher, student, update; without the feed) relative to that without
distillation, median over interleaved rounds. peak_mb: increase of the peak resident set of a new
process after the imports. top1_over_none and the differences in the last line are between runs with
the same seeds, in percentage points.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accuracy
import common
import torch

from fkdpipe.inspect.report import measure as measure_store
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage.store import Store, open_store
from fkdpipe.train import run
from fkdpipe.train.learner import parameters
from fkdpipe.train.settings import OptimizerSettings, ScheduleSettings, TrainSettings
from fkdpipe.train.state import Run
from fkdpipe.train.step import step

CROP = CropDistribution(scale=(0.5, 1.0), flip=0.0)
SIDES, LEARNED = (60, 90), 128
SWIN = "swin_small_patch4_window7_224"
WIDTHS = {"large": 64, "small": 32}  # of the teachers' first stage
STUDENT = {"channels": [16, 32, 64, 128], "output_stride": 8}  # a last map of 4 x 4, as theirs
NONE = "no distillation"


@dataclass(frozen=True)
class Size:
    """Scale of the experiment. copies: number of backgrounds per scan for the teachers."""

    copies: int
    teacher_epochs: int
    epochs: int
    rounds: int
    memory_steps: int


FULL = Size(copies=8, teacher_epochs=16, epochs=96, rounds=9, memory_steps=8)
QUICK = Size(copies=1, teacher_epochs=4, epochs=4, rounds=1, memory_steps=2)


@dataclass(frozen=True)
class Case:
    """A way to train the student. teacher: key of WIDTHS; quick: included in a trial."""

    table: str
    name: str
    method: dict[str, Any] = field(default_factory=lambda: {"name": "fkd"})
    teacher: str | None = "large"
    target: str = "ground-truth"
    quick: bool = True


def scalekd(name: str, **settings: Any) -> Case:
    return Case("scalekd", f"scalekd, {name}", {"name": "scalekd", **settings}, quick=False)


STORED = Case(
    "scalekd", "scalekd, stored map", {"name": "scalekd", "target": "stored"}, target="full"
)


CASES = (
    Case("main", NONE, teacher=None),
    Case("main", "kd", {"name": "kd"}),
    Case("main", "fitnet", {"name": "fitnet"}),
    Case("main", "srd", {"name": "srd"}),
    Case("main", "dpk", {"name": "dpk"}),
    Case("main", "scalekd", {"name": "scalekd"}),
    Case("main", "fkd", teacher=None, target="full"),
    Case("dpk", "dpk, small teacher", {"name": "dpk"}, teacher="small", quick=False),
    scalekd("linear alone", projector="linear", dfm=False, tpp=False),
    scalekd("cap alone", dfm=False, tpp=False),
    scalekd("cap + dfm", tpp=False),
    scalekd("cap + tpp", dfm=False),
    STORED,
)

# Claims of the papers as pairs of cases: (the better one, the other one).
CLAIMS = {
    "dpk_large_teacher_over_small": ("dpk", "dpk, small teacher"),
    "dpk_over_fitnet": ("dpk", "fitnet"),
    "srd_over_kd": ("srd", "kd"),
    "scalekd_over_fitnet": ("scalekd", "fitnet"),
    "cap_over_linear": ("scalekd, cap alone", "scalekd, linear alone"),
    "dfm_over_none": ("scalekd, cap + dfm", "scalekd, cap alone"),
    "tpp_over_none": ("scalekd, cap + tpp", "scalekd, cap alone"),
    "fkd_over_kd": ("fkd", "kd"),
}


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seeds", type=int, default=3)

    arguments = common.arguments(__doc__, add)
    size, seeds = (QUICK, 1) if arguments.quick else (FULL, arguments.seeds)
    cases = [case for case in CASES if case.quick or not arguments.quick]
    torch.set_num_threads(1)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fkdpipe-methods-") as folder:
        root = Path(folder)
        teachers = make_teachers(root, size)
        store = accuracy.make_store(
            root,
            teacher(root, "large"),
            crop=CROP,
            crops=size.epochs,
            features=("map",),
        )
        fields = measure_store(store).fields
        costs = measure(root, cases, size)
        results = train_all(root, cases, size.epochs, seeds)
    rows = table(cases, results, costs)
    figures = {
        "teachers": teachers,
        "claims": claims(results),
        "map_bytes_per_crop": sum(
            kept.bytes_per_crop for name, kept in fields.items() if name.endswith("map/value")
        ),
        "stored_map_step_vs_live": costs["scalekd"]["step_ms"] / costs[STORED.name]["step_ms"],
        "rows": results,
        "seconds": round(time.perf_counter() - begun),
    }
    common.finish("methods", rows, figures, quick=arguments.quick)


def pool(*, fresh: bool = False) -> ProcessPoolExecutor:
    """A pool with one process per core; `fresh` runs one task at a time, each in a new process."""
    spawn = multiprocessing.get_context("spawn")
    if fresh:
        return ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,), max_tasks_per_child=1)
    return ProcessPoolExecutor(common.cores(), spawn, torch.set_num_threads, (1,))


def make_teachers(root: Path, size: Size) -> dict[str, float]:
    """Write the images and train the teachers; return held-out top-1 percent by name."""
    looks = {"sides": SIDES, "plain": True}
    accuracy.make_images(root / "images", learned=LEARNED, **looks)
    accuracy.make_images(root / "teacher-images", copies=size.copies, **looks)
    with pool() as workers:
        jobs = {
            name: workers.submit(train_teacher, root, name, size.teacher_epochs) for name in WIDTHS
        }
        top1 = {name: job.result() for name, job in jobs.items()}
    common.say(f"teachers: {top1}")
    return top1


def train_teacher(root: Path, name: str, epochs: int) -> float:
    width = WIDTHS[name]
    options = {
        "patch_size": 4, "embed_dim": width, "depths": [2, 2], "num_heads": [width // 32, 4],
        "window_size": 4, "drop_path_rate": 0.0,
    }  # fmt: skip
    made = accuracy.settings(
        student=SWIN, student_options=options, size=32, epochs=epochs, crop=CROP, crops_per_image=1,
        optimizer=OptimizerSettings("adamw", lr=1e-3, weight_decay=0.02),
        schedule=ScheduleSettings(warmup_epochs=1, warmup_lr=2e-4),
    )  # fmt: skip
    result = accuracy.train(root, name, made, None, images="teacher-images")
    assert result.top1 is not None
    return round(result.top1, 2)


def teacher(root: Path, name: str) -> str:
    return f"{SWIN}={root / name / 'student.safetensors'}"


def settings(root: Path, case: Case, *, epochs: int, seed: int) -> TrainSettings:
    return accuracy.settings(
        student_options=STUDENT, size=32, crop=CROP, batch_size=32, epochs=epochs, seed=seed,
        method=case.method, target=case.target,
        teacher=teacher(root, case.teacher) if case.teacher else None,
    )  # fmt: skip


def store_of(root: Path, case: Case) -> Store | None:
    return None if case.target == "ground-truth" else open_store(root / "store")


def train_all(root: Path, cases: list[Case], epochs: int, seeds: int) -> list[dict[str, Any]]:
    """Train every case; a row for each case and seed, with its top-1 percent."""
    rows = []
    with pool() as workers:
        jobs = {
            (case.name, seed): workers.submit(train, root, case, epochs, seed)
            for seed in range(seeds)
            for case in cases
        }
        for (name, seed), job in jobs.items():
            rows.append({"method": name, "seed": seed, "top1": job.result()})
            common.say(f"{name}, seed {seed}: {rows[-1]['top1']}")
    return rows


def train(root: Path, case: Case, epochs: int, seed: int) -> float:
    made = settings(root, case, epochs=epochs, seed=seed)
    result = accuracy.train(root, f"{case.name}-{seed}", made, store_of(root, case))
    assert result.top1 is not None
    return round(result.top1, 2)


def measure(root: Path, cases: list[Case], size: Size) -> dict[str, dict[str, Any]]:
    """Auxiliary modules, step time and memory of each case."""
    runs = {case.name: prepare(root, case, "timed") for case in cases}
    measures = {name: stepper(made) for name, made in runs.items()}
    common.interleaved(1, **measures)  # the first step of each is slower
    times = common.interleaved(size.rounds, **measures)
    costs: dict[str, dict[str, Any]] = {}
    with pool(fresh=True) as worker:
        for case in cases:
            peak = worker.submit(peak_mb, root, case, size.memory_steps).result()
            costs[case.name] = {
                "step_over_none": common.median_ratio(times[case.name], times[NONE]),
                "step_ms": 1000 * statistics.median(times[case.name]),
                "peak_mb": round(peak, 1),
                "helper_params": parameters(runs[case.name].learner)["auxiliary"],
            }
            common.say(f"{case.name}: {costs[case.name]}")
    return costs


def prepare(root: Path, case: Case, name: str) -> Run:
    return run.prepare(
        settings(root, case, epochs=400, seed=0), root / "images", root / f"{name}-{case.name}",
        store=store_of(root, case), cache_dir=root / "cache", device=accuracy.CPU,
    )  # fmt: skip


def stepper(prepared: Run) -> Callable[[], float]:
    """A function that measures the seconds of one step on a prefetched batch."""
    batch = next(iter(prepared.crops.stream()))

    def seconds() -> float:
        begun = time.perf_counter()
        step(prepared, batch)
        return time.perf_counter() - begun

    return seconds


def peak_mb(root: Path, case: Case, steps: int) -> float:
    """Megabytes used by the start and first steps of a run, without the imports."""
    common.reset_peak()
    before = common.peak_bytes()
    prepared = prepare(root, case, "memory")
    for batch in itertools.islice(prepared.crops.stream(), steps):
        step(prepared, batch)
    return (common.peak_bytes() - before) / 1e6


def table(
    cases: list[Case], results: list[dict[str, Any]], costs: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each case: mean and spread over the seeds, and costs."""
    known = {row["method"]: row for row in accuracy.summary(results, ("method",))}
    return [
        {
            **known[case.name],
            "top1_over_none": difference(results, case.name, NONE)["mean"],
            **costs[case.name],
            "table": case.table,
        }
        for case in cases
    ]


def difference(results: list[dict[str, Any]], better: str, other: str) -> dict[str, float | None]:
    """Percentage points between two cases, mean and standard deviation over seeds."""
    top1 = {(row["method"], row["seed"]): row["top1"] for row in results}
    differences = [
        value - top1[other, seed] for (name, seed), value in top1.items() if name == better
    ]
    return {
        "mean": round(statistics.fmean(differences), 2),
        "std": round(statistics.stdev(differences), 2) if len(differences) > 1 else None,
    }


def claims(results: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Margin of each claim whose two cases have both been run."""
    names = {row["method"] for row in results}
    return {
        claim: difference(results, *pair) for claim, pair in CLAIMS.items() if set(pair) <= names
    }


if __name__ == "__main__":
    main()
