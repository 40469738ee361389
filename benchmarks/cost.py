"""Step time and memory of each method for Swin-S to ResNet-50, compared with ScaleKD's table 15.

    python benchmarks/cost.py [--quick]

On a GPU at 224 px, 128 crops, bfloat16; `--quick` runs the same code on any device with 8 crops of
64 px. Weights and pixels are random, which does not affect the time of a step. A step consists of
the teacher's forward pass, the student's forward and backward passes, and the update. Times are
medians over interleaved rounds, relative to FitNet (the paper's FD). Memory is the peak of
allocated GPU memory.

The paper, on V100s: ScaleKD 6.65 GB and 2.10 days, FD 3.66 GB and 1.67 days: 1.82 and 1.26.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch

from fkdpipe.networks import feature_layers, models
from fkdpipe.networks.feature_layers import FeatureNetwork, Needs
from fkdpipe.networks.models import ModelSpec
from fkdpipe.networks.teachers import autocast
from fkdpipe.train import methods, optim
from fkdpipe.train.learner import Learner
from fkdpipe.train.methods.interface import Context, Targets
from fkdpipe.train.settings import OptimizerSettings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
CLASSES = 1000
TEACHER, STUDENT = "swin_small_patch4_window7_224", "resnet50"
BASELINE = "fitnet"
METHODS: dict[str, dict[str, Any]] = {
    "none": {"name": "fkd"},
    "kd": {"name": "kd"},
    BASELINE: {"name": "fitnet"},
    "srd": {"name": "srd"},
    "dpk": {"name": "dpk"},
    "scalekd, cap alone": {"name": "scalekd", "dfm": False, "tpp": False},
    "scalekd": {"name": "scalekd"},
}
QUICK = ("none", BASELINE)


def make_step(table: dict[str, Any], side: int, batch: int) -> Callable[[], None]:
    """A function that runs a training step of a method on a fixed batch."""
    torch.manual_seed(0)
    needs = methods.needs(table)
    student, teacher = (
        models.build(ModelSpec(name), classes=CLASSES, size=(side, side), pretrained=False)
        for name in (STUDENT, TEACHER)
    )
    live = needs.live or needs.teacher is not None or needs.soft is not None
    frozen = FeatureNetwork(teacher.module, needs.teacher or Needs()).eval().requires_grad_(False)
    network, frozen = FeatureNetwork(student.module, needs.student).to(DEVICE), frozen.to(DEVICE)
    context = Context(
        classes=CLASSES,
        scores=CLASSES,
        epochs=100,
        student=feature_layers.example(network, (side, side), DEVICE),
        student_network=student.module,
        teacher=feature_layers.example(frozen, (side, side), DEVICE),
        teacher_network=teacher.module,
    )
    learner = Learner(network, methods.build(table, context)).to(DEVICE).train()
    optimizer = optim.build(learner, OptimizerSettings("sgd", lr=0.01))
    pixels = torch.rand(batch, 3, side, side, device=DEVICE).to(memory_format=torch.channels_last)
    truth_BC = torch.eye(CLASSES, device=DEVICE)[torch.arange(batch) % CLASSES]

    def step() -> None:
        with autocast("bfloat16" if ON_GPU else "float32", DEVICE):
            outputs = None
            if live:
                with torch.no_grad():
                    outputs = frozen(pixels)
            _, terms = learner(pixels, Targets(truth_BC, truth_BC, outputs))
        torch.stack([term.float().mean() for term in terms.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None], steps: int) -> float:
    """Seconds per step, averaged over a few steps."""
    wait()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - begun) / steps


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def peak_gb(table: dict[str, Any], side: int, batch: int) -> float | None:
    """Peak GPU memory of a method in GB; None without a GPU."""
    if not ON_GPU:
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = make_step(table, side, batch)
    step()
    step()
    return torch.cuda.max_memory_allocated() / 1e9


def main() -> None:
    arguments = common.arguments(__doc__)
    if not (ON_GPU or arguments.quick):
        raise SystemExit("the full run needs a GPU; use --quick to test the code without one")
    side, batch = (64, 8) if arguments.quick else (224, 128)
    tables = {name: METHODS[name] for name in (QUICK if arguments.quick else METHODS)}
    peaks = {name: peak_gb(table, side, batch) for name, table in tables.items()}
    steps = {name: make_step(table, side, batch) for name, table in tables.items()}
    rounds, each = (2, 1) if arguments.quick else (7, 10)
    measures = {name: lambda s=step: seconds(s, each) for name, step in steps.items()}
    times = {
        name: durations[1:]
        for name, durations in common.interleaved(rounds + 1, **measures).items()
    }
    rows = [
        {
            "method": name,
            "step_ms": 1000 * statistics.median(durations),
            "step_over_fitnet": common.median_ratio(durations, times[BASELINE]),
            "peak_gb": peaks[name],
        }
        for name, durations in times.items()
    ]
    common.finish("cost", rows, {"rows": rows}, quick=arguments.quick)


if __name__ == "__main__":
    main()
