"""KD: the teacher's softened probabilities beside the ground truth.

With mixup or CutMix and a live teacher, which then sees the mixed images too, this is the
consistent teaching of FunMatch.

References:
    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", section 2.
    Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", section 2.
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
    """weight: share of the teacher's term; 1 leaves the ground truth out. temperature: T."""

    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UsageError(f"weight must be within 0 and 1; found {self.weight}.")
        if self.temperature <= 0:
            raise UsageError(f"temperature must be positive; found {self.temperature}.")


def needs(settings: Settings) -> MethodNeeds:
    return MethodNeeds(soft=settings.temperature)


class Kd(Method):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.weight, self.temperature = settings.weight, settings.temperature

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        t = self.temperature
        soft = losses.kl_divergence(student.logits / t, targets.soft(t)) * t**2
        if self.weight == 1:
            return {"kd": soft}
        hard = losses.soft_cross_entropy(student.logits, targets.truth_BC)
        return {"kd": self.weight * soft, "hard": (1 - self.weight) * hard}


def build(settings: Settings, context: Context) -> Kd:
    return Kd(settings)
