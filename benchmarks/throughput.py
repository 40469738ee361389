"""Both phases on a GPU against the networks alone, and the bottleneck of training.

    python benchmarks/throughput.py [--quick] [--device cpu]

Photographs of about 500 x 375 pixels, 224 px, 16 recorded crops per image of which 4 share a batch,
bfloat16 autocast, networks with random weights (which do not affect speed), interleaved rounds.

generation  all of phase 1 into a fresh store: `dali` replay with nvJPEG, teacher, top-5 labels,
            commit, seal; against
forward     the same teacher on one synthetic batch repeatedly, with the same precision
training    steps from the feed with stored labels; against
synthetic   the same student, optimiser and precision on one synthetic batch of pixels and targets

It also measures the parts of a training step alone, in milliseconds per batch; since they overlap,
the slowest is the bottleneck. `decode` produces crops of 8 x 8 pixels, so that resizing costs
almost nothing; `replay` produces those of the student. `host to device` is the copy of a batch of
the `cpu` replay from pinned memory; pixels of the `dali` replay are already on the device.

Without a GPU, the exit code is 2, except with `--quick --device cpu`, which tests the script with
small networks and the `cpu` replay.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import common
import photographs
import timm
import torch

from fkdpipe.common.distributed import default_threads
from fkdpipe.labelgen import generate, plan
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks import models, teachers, weight_files
from fkdpipe.networks.teachers import Precision, Teacher, autocast
from fkdpipe.pixels import replay
from fkdpipe.pixels.replay import Backend, View
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.store import Store
from fkdpipe.train import loop, run
from fkdpipe.train.batch import Batch
from fkdpipe.train.settings import OptimizerSettings, TrainSettings
from fkdpipe.train.state import Run

M, K = 4, 5


@dataclass(frozen=True)
class Scale:
    """Scale of the benchmark. batch: batch size in crops, for teacher and training."""

    student: str
    teacher: str
    size: int
    batch: int
    images: int
    classes: int
    crops: int
    steps: int
    rounds: int
    precision: Precision
    replay: Backend


FULL = Scale(
    "resnet50", "vit_large_patch16_224", 224, 256, 4000, 1000, 16, 60, 5, "bfloat16", "dali"
)
TRIAL = Scale("test_resnet", "test_vit", 32, 16, 40, 10, 4, 2, 2, "float32", "cpu")


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")

    arguments = common.arguments(__doc__, add)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        common.say("no CUDA device found; use --quick --device cpu to test the script without one.")
        sys.exit(2)
    if arguments.device == "cpu" and not arguments.quick:
        common.say("--device cpu only tests the script and requires --quick.")
        sys.exit(2)
    scale = FULL if arguments.device == "cuda" else TRIAL
    if arguments.quick and arguments.device == "cuda":
        scale = replace(FULL, images=1000, crops=M, steps=10, rounds=2)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), scale, torch.device(arguments.device))
        rates = common.interleaved(
            scale.rounds + 1,
            generation=bench.generation,
            forward=bench.forward,
            training=bench.training,
            synthetic=bench.synthetic,
        )
        rates = {name: values[1:] for name, values in rates.items()}  # the first round warms up
        parts_ms = bench.parts_ms()
    rows = [{"what": name, "crops_per_s": statistics.median(v)} for name, v in rates.items()]
    rows += [{"what": name, "ms_per_batch": ms} for name, ms in parts_ms.items()]
    figures = {
        "generation_vs_forward": common.median_ratio(rates["generation"], rates["forward"]),
        "training_vs_synthetic": common.median_ratio(rates["training"], rates["synthetic"]),
        "wait_share": statistics.median(bench.wait_shares[1:]),
        "training_limit": max(parts_ms, key=lambda name: parts_ms[name]),
    }
    common.finish("throughput", rows, figures, quick=arguments.quick)


class Bench:
    """Objects shared by the measurements, which return crops per second."""

    def __init__(self, root: Path, scale: Scale, device: torch.device) -> None:
        self.root, self.scale, self.device = root, scale, device
        write_images(root / "images", scale)
        self.teacher = load_teacher(root, scale, device)
        common.say(f"{scale.teacher} labels {scale.images} images, {scale.crops} crops each")
        store, _ = self.label("store")
        self.fed = self.prepare(store, "fed")
        self.bare = self.prepare(store, "bare")
        self.batches: Iterator[Batch] = self.fed.crops.stream()
        self.wait_shares: list[float] = []
        shape = (scale.batch, 3, scale.size, scale.size)
        self.pixels = torch.rand(shape, device=device).contiguous(memory_format=torch.channels_last)
        self.prob_BC = torch.rand(scale.batch, scale.classes, device=device).softmax(dim=1)

    def label(self, name: str) -> tuple[Store, float]:
        """Generate a store; return (store, crops per second)."""
        scale = self.scale
        settings = GenerateSettings(
            teacher=("bench",), crops=scale.crops, source="t", form=f"topk:{K}",
            precision=scale.precision, replay=scale.replay,
        )  # fmt: skip
        planned = plan.prepare(
            LocalLocation(self.root / name),
            self.root / "images",
            settings,
            [self.teacher],
            device=self.device,
        )
        resources = generate.Resources(
            device=self.device, batch=scale.batch, threads=default_threads()
        )
        begun = time.perf_counter()
        generate.generate(planned, [self.teacher], resources)
        return planned.store, scale.images * scale.crops / (time.perf_counter() - begun)

    def prepare(self, store: Store, name: str) -> Run:
        scale = self.scale
        settings = TrainSettings(
            student=scale.student,
            size=scale.size,
            target=f"marginal-smoothing:{K}",
            epochs=4000,
            batch_size=scale.batch,
            crops_per_image=M,
            precision=scale.precision,
            replay=scale.replay,
            optimizer=OptimizerSettings(lr=0.01),
        )
        return run.prepare(
            settings,
            self.root / "images",
            self.root / name,
            store=store,
            cache_dir=self.root / "cache",
            device=self.device,
        )

    def generation(self) -> float:
        _, rate = self.label("again")
        shutil.rmtree(self.root / "again")
        return rate

    def forward(self) -> float:
        def one() -> None:
            with torch.no_grad(), autocast(self.scale.precision, self.device):
                self.teacher.module.network(self.pixels)

        return self.rate(one)

    def training(self) -> float:
        waited = 0.0

        def one() -> None:
            nonlocal waited
            begun = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - begun
            loop.step(self.fed, batch)
            self.fed.step += 1

        one()  # discard what was read ahead while others ran
        self.wait()
        waited = 0.0
        seconds = self.seconds(one)
        self.wait_shares.append(waited / (seconds * self.scale.steps))
        return self.scale.batch / seconds

    def synthetic(self) -> float:
        network, optimizer = self.bare.module.network.train(), self.bare.optimizer

        def one() -> None:
            with autocast(self.scale.precision, self.device):
                logits_BC = network(self.pixels)
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(logits_BC.float(), self.prob_BC).backward()
            optimizer.step()

        return self.rate(one)

    def parts_ms(self) -> dict[str, float]:
        """Milliseconds per batch of each part alone, as the median over the rounds."""
        feed = self.fed.feed
        batch = next(feed.stream())
        host = torch.empty_like(batch.views[0])
        host = host.pin_memory() if self.device.type == "cuda" else host
        values = {name: torch.from_numpy(batch.values[name]) for name in ("ids", "prob", "rest")}
        labels = feed.data.labels
        assert labels is not None

        def dense() -> torch.Tensor:
            return labels.dense({name: value.to(self.device) for name, value in values.items()})

        measures: dict[str, Callable[[], float]] = {
            "decode": lambda: self.replayed([View((8, 8))]),
            "replay": lambda: self.replayed(list(feed.views)),
            "host to device": lambda: self.seconds(lambda: host.to(self.device, copy=True)),
            "label expansion": lambda: self.seconds(dense),
            "student": lambda: self.scale.batch / self.synthetic(),
        }
        taken = common.interleaved(self.scale.rounds, **measures)
        return {name: 1e3 * statistics.median(seconds) for name, seconds in taken.items()}

    def replayed(self, views: list[View]) -> float:
        """Seconds to replay a batch of the feed's crops."""
        feed = self.fed.feed
        requests = itertools.islice(feed._requests(0), self.scale.steps + 3)
        with replay.open_replay(
            feed.backend, views, threads=feed.threads, prefetch=feed.prefetch, device=self.device
        ) as replayer:
            pixels = replayer.run(requests)
            for _ in range(3):  # read ahead before the measurement starts
                next(pixels)
            return self.seconds(lambda: next(pixels))

    def rate(self, one: Callable[[], None]) -> float:
        one()
        return self.scale.batch / self.seconds(one)

    def seconds(self, one: Callable[[], object]) -> float:
        """Seconds per call, averaged over consecutive calls."""
        self.wait()
        begun = time.perf_counter()
        for _ in range(self.scale.steps):
            one()
        self.wait()
        return (time.perf_counter() - begun) / self.scale.steps

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def write_images(root: Path, scale: Scale) -> None:
    """Write photographs to class folders, in turns."""
    photographs.write_folder(root, scale.images)
    for number, file in enumerate(sorted((root / "train").glob("*.jpg"))):
        inside = root / "train" / f"{number % scale.classes:04d}"
        inside.mkdir(exist_ok=True)
        file.rename(inside / file.name)


def load_teacher(root: Path, scale: Scale, device: torch.device) -> Teacher:
    """A random network, loaded from a checkpoint like any teacher."""
    torch.manual_seed(0)
    file = root / "teacher.safetensors"
    options = {"img_size": scale.size} if "vit" in scale.teacher else {}
    module = timm.create_model(scale.teacher, num_classes=scale.classes, **options)
    weight_files.write_export(file, module, {"student": scale.teacher, "options": {}})
    (teacher,) = teachers.load_teachers(
        [models.parse_spec(f"{scale.teacher}={file}")],
        class_names=[f"{k:04d}" for k in range(scale.classes)],
        precision=scale.precision,
        device=device,
        size=(scale.size, scale.size),
    )
    return teacher


if __name__ == "__main__":
    main()
