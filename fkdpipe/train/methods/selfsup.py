"""A student of a self-supervised teacher: the same kind of scores, softened on both sides.

The student's head is a helper: it is trained and left behind, and what is exported is a backbone
for `fkdpipe transfer` to probe. Targets are stored `logits`: embeddings of MoCo v2 or prototype
scores of SwAV, turned to probabilities at the same temperature as the student's.

Reference:
    Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import normalize

from fkdpipe.common.errors import UsageError
from fkdpipe.networks.feature_layers import Needs, Outputs
from fkdpipe.train import losses
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets


@dataclass(frozen=True)
class Settings:
    """head: which teacher's kind of scores. temperature: of both sides.

    hidden: width of the student's head, None for its own. embedding: of a SwAV head.
    """

    head: Literal["moco", "swav"] = "moco"
    temperature: float = 0.2
    hidden: int | None = None
    embedding: int = 128

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UsageError(f"temperature must be positive; found {self.temperature}.")


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
