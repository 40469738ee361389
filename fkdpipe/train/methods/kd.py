"""KD: KL divergence from the teacher's softened probabilities, plus the ground truth.

With mixup or CutMix and a live teacher, which then sees the same mixed images, this is FunMatch's
consistent teaching.

References:
    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", section 2.
    Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", section 2.
"""

from __future__ import annotations

import torch
from pydantic import PositiveFloat

from fkdpipe.common import config
from fkdpipe.common.config import Probability
from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.train import losses
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets


@config.settings
class Settings:
    """Weights of the two terms, and the temperature."""

    soft_weight: Probability = 1.0
    """Weight of the teacher's term; the ground truth's has 1 - soft_weight."""
    temperature: PositiveFloat = 1.0
    """T, the temperature of student and teacher."""


def needs(settings: Settings) -> MethodNeeds:
    return MethodNeeds(soft=settings.temperature)


class Kd(Method):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.soft_weight, self.temperature = settings.soft_weight, settings.temperature

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        t = self.temperature
        soft = losses.kl_divergence(student.logits / t, targets.soft(t)) * t**2
        if self.soft_weight == 1:
            return {"kd": soft}
        hard = losses.soft_cross_entropy(student.logits, targets.truth_BC)
        return {"kd": self.soft_weight * soft, "hard": (1 - self.soft_weight) * hard}


def build(settings: Settings, context: Context) -> Kd:
    return Kd(settings)
