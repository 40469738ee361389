"""A student of a self-supervised teacher: the same kind of scores, softened on both sides.

The student's head is a helper: it is trained and left behind, and what is exported is a backbone
for `fkdpipe transfer` to probe. Targets are stored `logits`: embeddings of MoCo v2 or prototype
scores of SwAV, turned to probabilities at the same temperature as the student's.

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
    """Kind of scores, and the student's head."""

    head: Literal["moco", "swav"] = "moco"
    """Which teacher's kind of scores."""
    temperature: PositiveFloat = 0.2
    """Of both sides."""
    hidden: PositiveInt | None = None
    """Width of the student's head; by default that of its features."""
    embedding: PositiveInt = 128
    """Width of the embedding of a SwAV head."""


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
        """(B, scores): cosine-like scores of the same kind as the teacher's."""
        assert student.penultimate is not None
        return self.prototypes(normalize(self.head(student.penultimate).float(), dim=1))

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        t = self.temperature
        return {"label": losses.soft_cross_entropy(self.scores(student) / t, targets.soft(t))}


def build(settings: Settings, context: Context) -> SelfSup:
    assert context.student.penultimate is not None
    return SelfSup(settings, context.student.penultimate.shape[1], context.scores)
