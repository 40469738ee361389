"""FKD: soft cross-entropy against stored labels of the same crops.

Also how a teacher or a baseline is trained: with target `ground-truth` the label is one-hot.

Reference:
    Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fkdpipe.common.errors import UsageError
from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.train import losses
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets


@dataclass(frozen=True)
class Settings:
    """weight: the target's share; the rest, 1 - weight, is the ground truth's cross-entropy."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UsageError(f"weight must be within 0 and 1; found {self.weight}.")


def needs(settings: Settings) -> MethodNeeds:
    return MethodNeeds()


class Fkd(Method):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.weight = settings.weight

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        label = losses.soft_cross_entropy(student.logits, targets.prob_BC)
        if self.weight == 1:
            return {"label": label}
        hard = losses.soft_cross_entropy(student.logits, targets.truth_BC)
        return {"label": self.weight * label, "hard": (1 - self.weight) * hard}


def build(settings: Settings, context: Context) -> Fkd:
    return Fkd(settings)
