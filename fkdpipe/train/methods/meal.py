"""MEAL V2: soft labels of an ensemble, and a discriminator that tells student from teacher.

The discriminator sees the student's logits and the stored probabilities of the same crops, as the
authors' code for stored labels does. In that code its loss is minimised by both sides, the student
included; `reverse` turns the student's gradient round, which makes it adversarial.

References:
    Shen and Savvides, "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet
    without Tricks", section 3; the authors' released training code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fkdpipe.common.errors import UsageError
from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.train import losses
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets


@dataclass(frozen=True)
class Settings:
    """weight: of the discriminator's loss. shrink: factor between its layers' widths.

    reverse: the student works against the discriminator, not with it.
    """

    weight: float = 1.0
    shrink: int = 8
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.weight < 0 or self.shrink < 1:
            raise UsageError("weight must not be negative, and shrink at least 1.")


def needs(settings: Settings) -> MethodNeeds:
    return MethodNeeds()


class _Reverse(torch.autograd.Function):
    """The same value, the opposite gradient."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


class Meal(Method):
    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        self.weight, self.reverse = settings.weight, settings.reverse
        middle = max(2, classes // settings.shrink)
        last = max(2, middle // settings.shrink)
        self.discriminator = nn.Sequential(
            nn.Linear(classes, middle), nn.ReLU(), nn.Linear(middle, last), nn.ReLU(),
            nn.Linear(last, 2), nn.ReLU(),
        )  # fmt: skip

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        label = losses.soft_cross_entropy(student.logits, targets.prob_BC)
        seen = student.logits.float()
        scores_B2 = self.discriminator(_Reverse.apply(seen) if self.reverse else seen)
        truth_B2 = self.discriminator(targets.prob_BC)
        told = _told(scores_B2, 0) + _told(truth_B2, 1)
        return {"label": label, "discriminator": self.weight * told / 2}


def _told(scores_B2: torch.Tensor, side: int) -> torch.Tensor:
    """(B,): binary cross-entropy of both outputs, their mean; side 0 is the student."""
    wanted = torch.zeros_like(scores_B2)
    wanted[:, side] = 1
    return binary_cross_entropy_with_logits(scores_B2, wanted, reduction="none").mean(dim=1)


def build(settings: Settings, context: Context) -> Meal:
    return Meal(settings, context.classes)
