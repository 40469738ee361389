"""Distil a self-supervised teacher: cross-entropy between softened scores of the same kind.

The student's head is an auxiliary module and is not exported; the exported backbone can be probed
with `fkdpipe transfer`. Targets are stored `logits`, MoCo v2 embeddings or SwAV prototype scores,
converted to probabilities at the student's temperature.

Reference:
    Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", section 3.4.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import nn
from torch.nn.functional import normalize

from fkdpipe.common import config
from fkdpipe.networks.feature_layers import Needs, Outputs
from fkdpipe.train import losses
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets


@config.settings
class Settings:
    """Type of scores, and the student's head."""

    head: Literal["moco", "swav"] = "moco"
    """Type of the teacher's scores."""
    temperature: PositiveFloat = 0.2
    """Temperature of student and teacher."""
    hidden: PositiveInt | None = None
    """Hidden width of the student's head; default: the width of its features."""
    embedding: PositiveInt = 128
    """Embedding width of a SwAV head."""


def needs(settings: Settings) -> MethodNeeds:
    return MethodNeeds(
        student=Needs(penultimate=True), soft=settings.temperature, classifier=False, scores=True
    )


class SelfSup(Method):
    def __init__(self, settings: Settings, width: int, scores: int) -> None:
        super().__init__()
        self.temperature = settings.temperature
        hidden = settings.hidden or width
        swav = settings.head == "swav"
        embedding = settings.embedding if swav else scores
        norm = [nn.BatchNorm1d(hidden)] if swav else []
        self.head = nn.Sequential(
            nn.Linear(width, hidden), *norm, nn.ReLU(), nn.Linear(hidden, embedding)
        )
        self.prototypes = nn.Linear(embedding, scores, bias=False) if swav else nn.Identity()

    def scores(self, student: Outputs) -> torch.Tensor:
        """(B, scores): scores of the same type as the teacher's."""
        assert student.penultimate is not None
        return self.prototypes(normalize(self.head(student.penultimate).float(), dim=1))

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        t = self.temperature
        return {"label": losses.soft_cross_entropy(self.scores(student) / t, targets.soft(t))}


def build(settings: Settings, context: Context) -> SelfSup:
    assert context.student.penultimate is not None
    return SelfSup(settings, context.student.penultimate.shape[1], context.scores)
