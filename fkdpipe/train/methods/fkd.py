"""FKD: soft cross-entropy with the stored labels of the same crops.

Also trains teachers and baselines: with target `ground-truth`, labels are one-hot.

Reference:
    Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", equation 1.
"""

from __future__ import annotations

import torch

from fkdpipe.common import config
from fkdpipe.common.config import Probability
from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.train import losses
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets


@config.settings
class Settings:
    """Weights of the two terms."""

    soft_weight: Probability = 1.0
    """Weight of the target's cross-entropy; the ground truth's has 1 - soft_weight."""


def needs(settings: Settings) -> MethodNeeds:
    return MethodNeeds()


class Fkd(Method):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.soft_weight = settings.soft_weight

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        label = losses.soft_cross_entropy(student.logits, targets.prob_BC)
        if self.soft_weight == 1:
            return {"label": label}
        hard = losses.soft_cross_entropy(student.logits, targets.truth_BC)
        return {"label": self.soft_weight * label, "hard": (1 - self.soft_weight) * hard}


def build(settings: Settings, context: Context) -> Fkd:
    return Fkd(settings)
