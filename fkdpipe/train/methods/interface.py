"""What a method is to the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Outputs:
    """What a network gave for a batch. Only what a method needs is filled.

    Attributes:
        logits: float (B, C).
    """

    logits: torch.Tensor


@dataclass(frozen=True)
class Targets:
    """What a batch is to be: on the device.

    Attributes:
        prob_BC: float32 probabilities of the chosen target. class_B: the folder's classes.
    """

    prob_BC: torch.Tensor
    class_B: torch.Tensor


@dataclass(frozen=True)
class Context:
    """What a method may know when it is built."""

    classes: int


class Method(nn.Module):
    """Base of all methods: a module, so that its trained helpers are its parameters."""

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        """Named terms whose sum is optimised: (B,) one value per sample, or a scalar."""
        raise NotImplementedError
