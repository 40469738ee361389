"""MEAL V2: soft labels of an ensemble, and a discriminator between student and teacher.

The discriminator sees the student's logits and the stored probabilities of the same crops, as in
the authors' code for stored labels. There, the student minimises the discriminator's loss too;
`reverse` reverses the student's gradient, which makes the training adversarial.

References:
    Shen and Savvides, "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet
    without Tricks", section 3; the authors' released training code.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fkdpipe.common import config
from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.train import losses
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets


@config.settings
class Settings:
    """The discriminator and its loss weight."""

    discriminator_weight: NonNegativeFloat = 1.0
    """Weight of the discriminator's loss; the label loss has weight 1."""
    shrink: PositiveInt = 8
    """Reduction factor of the width from each layer of the discriminator to the next."""
    reverse: bool = False
    """Reverse the student's gradient from the discriminator (adversarial training)."""


def needs(settings: Settings) -> MethodNeeds:
    return MethodNeeds()


class _Reverse(torch.autograd.Function):
    """Identity in the forward pass; negates the gradient."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


class Meal(Method):
    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        self.weight, self.reverse = settings.discriminator_weight, settings.reverse
        middle = max(2, classes // settings.shrink)
        last = max(2, middle // settings.shrink)
        self.discriminator = nn.Sequential(
            nn.Linear(classes, middle), nn.ReLU(), nn.Linear(middle, last), nn.ReLU(),
            nn.Linear(last, 2), nn.ReLU(),
        )  # fmt: skip

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        label = losses.soft_cross_entropy(student.logits, targets.prob_BC)
        logits = student.logits.float()
        scores_B2 = self.discriminator(_Reverse.apply(logits) if self.reverse else logits)
        truth_B2 = self.discriminator(targets.prob_BC)
        total = _discriminator_loss(scores_B2, 0) + _discriminator_loss(truth_B2, 1)
        return {"label": label, "discriminator": self.weight * total / 2}


def _discriminator_loss(scores_B2: torch.Tensor, side: int) -> torch.Tensor:
    """(B,): binary cross-entropy, mean over both outputs; side 0 is the student."""
    target_B2 = torch.zeros_like(scores_B2)
    target_B2[:, side] = 1
    return binary_cross_entropy_with_logits(scores_B2, target_B2, reduction="none").mean(dim=1)


def build(settings: Settings, context: Context) -> Meal:
    return Meal(settings, context.classes)
