"""FitNet: match the teacher's maps after a 1 x 1 convolution on the student's.

The feature baseline (FD) of ScaleKD and of DPK's table 8. On token maps, the 1 x 1 convolution is a
linear layer per token.

References:
    Romero et al., "FitNets: Hints for Thin Deep Nets", equation 3.
    Fan et al., "ScaleKD", table 1: FD on the last stage, and on the last two.
"""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, field_validator
from torch import nn

from fkdpipe.common import config
from fkdpipe.networks.feature_layers import Needs, Outputs
from fkdpipe.train.methods import parts
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets


@config.settings
class Settings:
    """Loss weights and maps."""

    feature_weight: NonNegativeFloat = 1.0
    """Weight of the mean squared error of the maps."""
    soft_weight: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the teacher's probabilities."""
    hard_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropy with the ground truth."""
    temperature: PositiveFloat = 1.0
    """Temperature of student and teacher probabilities."""
    stages: tuple[PositiveInt, ...] = (1,)
    """Stages, counted from the end; 1 is the last map, after the final norm."""

    @field_validator("stages")
    @classmethod
    def _each_once(cls, stages: tuple[int, ...]) -> tuple[int, ...]:
        parts.check_stages(stages)
        return stages


def needs(settings: Settings) -> MethodNeeds:
    inner = tuple(stage for stage in settings.stages if stage > 1)
    needs = Needs(stages=inner, final=1 in settings.stages)
    return MethodNeeds(
        student=needs,
        teacher=needs,
        soft=settings.temperature if settings.soft_weight else None,
        live=True,
        classifier=bool(settings.hard_weight or settings.soft_weight),
    )


class FitNet(Method):
    """FitNet's loss, with a projector C_s -> C_t per stage."""

    def __init__(self, settings: Settings, student: Outputs, teacher: Outputs) -> None:
        super().__init__()
        self.settings = settings
        self.projectors = nn.ModuleDict(
            {
                str(stage): nn.Conv2d(
                    _map(student, stage).shape[1], _map(teacher, stage).shape[1], 1
                )
                for stage in settings.stages
            }
        )

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        s = self.settings
        assert targets.teacher is not None
        terms = parts.logit_terms(
            student,
            targets,
            hard_weight=s.hard_weight,
            soft_weight=s.soft_weight,
            temperature=s.temperature,
        )
        for stage in s.stages:
            target = _map(targets.teacher, stage)
            projected = self.projectors[str(stage)](_map(student, stage))
            projected = parts.on_grid(projected, parts.grid_of(target))
            error = (projected.float() - target.float()).square().mean(dim=(1, 2, 3))
            terms[f"feature_{stage}"] = s.feature_weight * error
        return terms


def build(settings: Settings, context: Context) -> FitNet:
    return FitNet(settings, context.student, parts.teacher_side(context.teacher, "fitnet"))


def _map(outputs: Outputs, stage: int) -> torch.Tensor:
    """The map of a stage; the last one after the final norm."""
    if stage > 1:
        return outputs.stages[stage]
    assert outputs.final is not None
    return outputs.final
