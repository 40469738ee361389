"""Made-up outputs of students and teachers, for tests of methods without networks."""

from __future__ import annotations

import torch

from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.train.methods.interface import Context, Targets

CLASSES = 5


def outputs(
    batch: int,
    stages: dict[int, tuple[int, int]],
    *,
    final: tuple[int, int] | None = None,
    seed: int = 0,
    grad: bool = True,
) -> Outputs:
    """Random maps. stages: number from the end -> (channels, side); final: the same."""
    random = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).requires_grad_(grad)

    return Outputs(
        logits=made(batch, CLASSES),
        stages={k: made(batch, c, side, side) for k, (c, side) in stages.items()},
        final=made(batch, final[0], final[1], final[1]) if final else None,
    )


def targets(teacher: Outputs, *, epoch: int = 0) -> Targets:
    batch = len(teacher.logits)
    truth_BC = torch.nn.functional.one_hot(torch.arange(batch) % CLASSES, CLASSES).float()
    return Targets(prob_BC=truth_BC, truth_BC=truth_BC, teacher=teacher, epoch=epoch)


def context(student: Outputs, teacher: Outputs, *, epochs: int = 10, **networks) -> Context:
    networks = {"student_network": torch.nn.Identity(), **networks}
    return Context(
        classes=CLASSES, scores=CLASSES, epochs=epochs, student=student, teacher=teacher, **networks
    )
