"""FKD: soft cross-entropy against stored labels of the same crops.

Also how a teacher or a baseline is trained: with target `ground-truth` the label is one-hot.

Reference:
    Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fkdpipe.errors import UsageError
from fkdpipe.taps import Outputs
from fkdpipe.train import losses
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets


@dataclass(frozen=True)
class Settings:
    """hard_weight: share of the ground truth's cross-entropy, beside the target's."""

    hard_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.hard_weight <= 1:
            raise UsageError(f"hard_weight must be within 0 and 1; found {self.hard_weight}.")


def needs(settings: Settings) -> MethodNeeds:
    return MethodNeeds()


class Fkd(Method):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.hard_weight = settings.hard_weight

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        label = losses.soft_cross_entropy(student.logits, targets.prob_BC)
        if not self.hard_weight:
            return {"label": label}
        hard = losses.soft_cross_entropy(student.logits, targets.truth_BC)
        return {"label": (1 - self.hard_weight) * label, "hard": self.hard_weight * hard}


def build(settings: Settings, context: Context) -> Fkd:
    return Fkd(settings)
