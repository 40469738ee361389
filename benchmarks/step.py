"""Cost of a training step: with stored labels, without distillation, with a live teacher.

    python benchmarks/step.py [--quick]

One student, feed and store. All sides use the same crops in the same order, in interleaved rounds.

plain   the folder's classes, no labels read
fkd     stored top-5 labels
kd      a live teacher in every step, its forward pass r times the student's (measured here)

A step of the student is counted as three forward passes, so with a teacher of relative cost r the
ideal speed-up of stored labels is (3 + r) / 3. Weights are random, as they do not affect speed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import timm
import torch

from fkdpipe.commands import demo_data
from fkdpipe.labelgen import generate, plan
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks import models, teachers, weight_files
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.store import Store, open_store
from fkdpipe.train import loop, run
from fkdpipe.train.batch import Batch
from fkdpipe.train.settings import OptimizerSettings, TrainSettings
from fkdpipe.train.state import Run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
STUDENT = "resnet50" if ON_GPU else "resnet10t"
SIZE = 224 if ON_GPU else 160
BATCH = 256 if ON_GPU else 64
M = 4
# Teachers with about 5, 10 and 20 times the student's forward cost; r is measured.
TEACHERS = (
    {5: "resnetv2_101x1_bit", 10: "vit_large_patch16_224", 20: "regnety_320"}
    if ON_GPU
    else {5: "resnet50d", 10: "wide_resnet50_2", 20: "wide_resnet101_2"}
)


def main() -> None:
    arguments = common.arguments(__doc__)
    rounds, steps = (2, 2) if arguments.quick else (7, 3)
    teachers_ = {5: TEACHERS[5]} if arguments.quick else TEACHERS
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        demo_data.make_images(root / "images", count=200 if arguments.quick else 1000)
        store = make_store(root)
        common.say("runs: plain, fkd and " + ", ".join(f"kd {name}" for name in teachers_.values()))
        runs = {"plain": prepare(root, store, "plain", target="ground-truth")}
        runs["fkd"] = prepare(root, store, "fkd", target="marginal-smoothing:5")
        for r, name in teachers_.items():
            runs[f"kd_r{r}"] = prepare(
                root,
                store,
                f"kd{r}",
                target="ground-truth",
                teacher=f"{name}={weights(root, name)}",
                teacher_size=SIZE,
                method={"name": "kd"},
            )
        sides = {name: Side(made, steps) for name, made in runs.items()}
        measures = {name: side.seconds for name, side in sides.items()}
        measures["student_forward"] = lambda: forward_seconds(runs["fkd"].module.network, steps)
        for r in teachers_:
            network = runs[f"kd_r{r}"].teacher.module.network  # type: ignore[union-attr]
            measures[f"forward_r{r}"] = lambda n=network: forward_seconds(n, steps)  # type: ignore[misc]
        times = common.interleaved(rounds + 1, **measures)
    times = {name: values[1:] for name, values in times.items()}  # the first round warms up
    report(times, teachers_, quick=arguments.quick)


def report(times: dict[str, list[float]], asked: dict[int, str], *, quick: bool) -> None:
    figures = {"plain_vs_fkd": common.median_ratio(times["plain"], times["fkd"])}
    rows = [
        {"side": name, "ms_per_crop": 1000 * statistics.median(times[name]) / BATCH}
        for name in ("plain", "fkd")
    ]
    for r, name in asked.items():
        measured = common.median_ratio(times[f"forward_r{r}"], times["student_forward"])
        speed_up = common.median_ratio(times[f"kd_r{r}"], times["fkd"])
        ideal = (3 + measured) / 3
        figures[f"fkd_vs_kd_r{r}"] = speed_up
        figures[f"fkd_vs_kd_share_of_ideal_r{r}"] = speed_up / ideal
        rows.append(
            {
                "side": f"kd, {name}",
                "ms_per_crop": 1000 * statistics.median(times[f"kd_r{r}"]) / BATCH,
                "r": measured,
                "fkd_vs_kd": speed_up,
                "ideal": ideal,
                "share_of_ideal": speed_up / ideal,
            }
        )
    common.finish("step", rows, figures, quick=quick)


def make_store(root: Path) -> Store:
    (teacher,) = teachers.load_teachers(
        [models.parse_spec(f"test_resnet={weights(root, 'test_resnet')}")],
        class_names=[str(k) for k in range(10)],
        device=DEVICE,
        size=(32, 32),
    )
    settings = GenerateSettings(teacher=("bench",), crops=16, source="t", form="topk:5")
    planned = plan.prepare(
        LocalLocation(root / "store"), root / "images", settings, [teacher], device=DEVICE
    )
    generate.generate(planned, [teacher], generate.Resources(device=DEVICE, batch=64, threads=2))
    return open_store(root / "store")


def weights(root: Path, name: str) -> Path:
    """Write a checkpoint of a random network with ten classes."""
    file = root / f"{name}.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        options = {"img_size": SIZE} if "vit" in name else {}
        module = timm.create_model(name, num_classes=10, **options)
        weight_files.write_export(file, module, {"student": name, "options": {}})
    return file


def prepare(root: Path, store: Store, name: str, **changes) -> Run:
    settings = TrainSettings(
        **{
            "student": STUDENT,
            "size": SIZE,
            "epochs": 4000,
            "batch_size": BATCH,
            "crops_per_image": M,
            "eval_every": 4000,
            "optimizer": OptimizerSettings(lr=0.01),
            **changes,
        }
    )
    return run.prepare(
        settings, root / "images", root / name, store=store, cache_dir=root / "cache", device=DEVICE
    )


class Side:
    """A run that proceeds a few steps at a time."""

    def __init__(self, made: Run, steps: int) -> None:
        self.run, self.steps = made, steps
        self._batches: Iterator[Batch] = made.crops.stream()

    def seconds(self) -> float:
        """Seconds per step, averaged over consecutive steps."""
        loop.step(self.run, next(self._batches))  # discard what was read ahead while others ran
        wait()
        begun = time.perf_counter()
        for _ in range(self.steps):
            loop.step(self.run, next(self._batches))
            self.run.step += 1
        wait()
        return (time.perf_counter() - begun) / self.steps


def forward_seconds(network: torch.nn.Module, steps: int) -> float:
    pixels = torch.rand(BATCH, 3, SIZE, SIZE, device=DEVICE)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    was_training = network.training
    network.eval()
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
        network(pixels)
        wait()
        begun = time.perf_counter()
        for _ in range(max(2, steps // 2)):
            network(pixels)
        wait()
    network.train(was_training)
    return (time.perf_counter() - begun) / max(2, steps // 2)


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
