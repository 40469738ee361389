"""FKD: soft cross-entropy against stored labels of the same crops.

Also how a teacher or a baseline is trained: with target `ground-truth` the label is one-hot.

Reference:
    Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fkdpipe.train import losses
from fkdpipe.train.methods.interface import Context, Method, Outputs, Targets


@dataclass(frozen=True)
class Settings:
    """Nothing to set: the target says it all."""


class Fkd(Method):
    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        return {"label": losses.soft_cross_entropy(student.logits, targets.prob_BC)}


def build(settings: Settings, context: Context) -> Fkd:
    return Fkd()
