"""One real training step of every student-teacher pair that the papers name.

    python benchmarks/pairs.py [--quick]

Full-size networks with random weights, 8 pieces of real photographs at 64 pixels. A step consists
of forward, backward and update. Checked are: the loss is finite; every trained parameter has a
gradient and changes (unless the gradient is zero); the teacher has no gradients and stays in eval
mode. `--quick` only runs the pairs of small networks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import common
import numpy as np
import torch
from sklearn.datasets import load_sample_images

from fkdpipe.networks import feature_layers, models
from fkdpipe.networks.feature_layers import FeatureNetwork, Needs
from fkdpipe.networks.models import Loaded, ModelSpec
from fkdpipe.pixels.replay import normalise
from fkdpipe.train import methods, optim
from fkdpipe.train.learner import Learner
from fkdpipe.train.methods.interface import Context, Targets
from fkdpipe.train.settings import OptimizerSettings

SIDE, BATCH, CLASSES = 64, 8, 10
CPU = torch.device("cpu")

TWO_STAGES = {"stages": [{"stage": 1}, {"stage": 2}]}
DEIT = {"form": "corr", "student": "tokens"}  # the authors' settings for this pair
SOFT = {"softmax_scale": 1.0}  # ScaleKD's setting for plain transformers
SWIN = "swin_small_patch4_window7_224"


@dataclass(frozen=True)
class Pair:
    """A student-teacher pair. quick: small enough for a trial."""

    teacher: str
    student: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    quick: bool = False


PAIRS = (
    Pair("resnet34", "resnet18", "dpk", TWO_STAGES),
    Pair("resnet50", "mobilenetv2_100", "dpk", TWO_STAGES),
    Pair("deit_small_patch16_224", "deit_tiny_patch16_224", "dpk", TWO_STAGES, quick=True),
    Pair(SWIN, "resnet50", "scalekd"),
    Pair(SWIN, "mixer_s16_224", "scalekd"),
    Pair(SWIN, "vit_small_patch16_224", "scalekd"),
    Pair(SWIN, "convnext_tiny", "scalekd"),
    Pair(SWIN, "swin_tiny_patch4_window7_224", "scalekd"),
    Pair(SWIN, "mobilenetv1_100", "scalekd"),
    Pair("vit_base_patch16_224", "resnet50", "scalekd", SOFT),
    Pair("beit_base_patch16_224", "resnet50", "scalekd", SOFT),
    Pair("regnety_160", "deit_tiny_distilled_patch16_224", "srd", DEIT),
    Pair("resnet34", "resnet18", "fitnet", {"stages": [1, 2]}, quick=True),
)


def main() -> None:
    options = common.arguments(__doc__)
    torch.set_num_threads(1)
    pairs = [pair for pair in PAIRS if pair.quick or not options.quick]
    rows = []
    for pair in pairs:
        common.say(f"{pair.teacher} -> {pair.student}, {pair.method}")
        rows.append(step(pair))
    common.finish("pairs", rows, {"pairs": len(rows)}, quick=options.quick)


def step(pair: Pair) -> dict[str, Any]:
    """Run one step of a pair.

    Raises:
        AssertionError: a check failed.
    """
    torch.manual_seed(0)
    table = {"name": pair.method, **pair.settings}
    needs = methods.needs(table)
    student, teacher = build(pair.student), build(pair.teacher)
    frozen = FeatureNetwork(teacher.module, needs.teacher or Needs()).eval().requires_grad_(False)
    network = FeatureNetwork(student.module, needs.student)
    context = Context(
        classes=CLASSES,
        scores=CLASSES,
        epochs=100,
        student=feature_layers.example(network, (SIDE, SIDE), CPU),
        student_network=student.module,
        teacher=feature_layers.example(frozen, (SIDE, SIDE), CPU),
        teacher_network=teacher.module,
    )
    learner = Learner(network, methods.build(table, context)).train()
    optimizer = optim.build(learner, OptimizerSettings("sgd", lr=0.01))
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    begun = time.perf_counter()
    with torch.no_grad():
        outputs = frozen(pixels(teacher))
    truth_BC = torch.nn.functional.one_hot(torch.arange(BATCH), CLASSES).float()
    _, terms = learner(
        pixels(student), Targets(prob_BC=truth_BC, truth_BC=truth_BC, teacher=outputs)
    )
    loss = torch.stack([term.mean() for term in terms.values()]).sum()
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - begun
    check(learner, frozen, before, loss)
    return {
        "pair": f"{pair.teacher} -> {pair.student}",
        "method": pair.method,
        "student_params": count(student.module),
        "teacher_params": count(teacher.module),
        "helper_params": count(learner.method),
        "loss": float(loss),
        "step_s": seconds,
    }


def build(name: str) -> Loaded:
    return models.build(ModelSpec(name), classes=CLASSES, size=(SIDE, SIDE), pretrained=False)


def pixels(network: Loaded) -> torch.Tensor:
    """float32 (8, 3, 64, 64), preprocessed for the network."""
    random = np.random.default_rng(0)
    pieces = []
    for k in range(BATCH):
        photograph = load_sample_images().images[k % 2]
        top, left = (int(random.integers(n - SIDE)) for n in photograph.shape[:2])
        pieces.append(photograph[top : top + SIDE, left : left + SIDE])
    raw = torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2)
    return normalise(raw, network.preprocessing.mean, network.preprocessing.std)


def check(
    learner: Learner, teacher: FeatureNetwork, before: dict[str, torch.Tensor], loss: torch.Tensor
) -> None:
    assert torch.isfinite(loss), "the loss is not finite"
    assert not any(part.training for part in teacher.modules()), "the teacher is in train mode"
    assert all(p.grad is None for p in teacher.parameters()), "the teacher has gradients"
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
        moved = not torch.equal(parameter.detach(), before[name])
        assert moved or not parameter.grad.any(), f"{name} did not move"


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


if __name__ == "__main__":
    main()
