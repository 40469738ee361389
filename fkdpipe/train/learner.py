"""Student and method as one module, so that DDP and torch.compile see every forward pass."""

from __future__ import annotations

import torch
from torch import nn

from fkdpipe.taps import Tapped
from fkdpipe.train.methods.interface import Method, Targets


class Learner(nn.Module):
    """Pixels and targets in, logits and named loss terms out.

    The teacher is not in here: nothing that trains this module can train it or leave its eval mode.
    """

    def __init__(self, student: Tapped, method: Method) -> None:
        super().__init__()
        self.student = student
        self.method = method

    def forward(
        self, pixels_B3HW: torch.Tensor, targets: Targets
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs = self.student(pixels_B3HW)
        return outputs.logits, self.method.loss(outputs, targets)
