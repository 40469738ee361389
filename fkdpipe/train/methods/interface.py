"""Interface between methods and the trainer.

A method declares what it needs, holds its auxiliary modules, and computes named loss terms from the
outputs of student and teacher. It does not know whether the teacher's outputs come from a store or
from a live model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fkdpipe.networks.feature_layers import Needs, Outputs
from fkdpipe.storage.settings import FeatureSettings


@dataclass(frozen=True)
class MethodNeeds:
    """Requirements of a method.

    Attributes:
        student: feature layers of the student.
        teacher: feature layers of the teacher, live or stored; None if it needs none.
        soft: temperature of the teacher's probabilities; None if it needs none. They come from
            the store if the run's target does, else from a live teacher.
        live: requires a live teacher, for example for its last stage.
        stored: the teacher's outputs come from the store; a live teacher only provides layers
            and is not run on the images.
        classifier: whether the loss uses the student's logits; if not, its classifier is not
            trained.
        independent: no two crops of one image in a batch, for losses that couple the batch.
        least: minimum crops per forward pass, for losses with batch statistics.
        mixing: whether mixup and CutMix are supported.
        scores: whether the stored labels may be scores of something other than the classes.
    """

    student: Needs = Needs()
    teacher: Needs | None = None
    soft: float | None = None
    live: bool = False
    stored: bool = False
    classifier: bool = True
    independent: bool = False
    least: int = 1
    mixing: bool = True
    scores: bool = False


@dataclass(frozen=True)
class Targets:
    """Targets of a batch of B crops, on the device, in float32.

    Attributes:
        prob_BC: probabilities of the run's target; one-hot for ground truth.
        truth_BC: one-hot classes of the folder, mixed like the pixels.
        teacher: the required outputs of the teacher, without gradients; logits only if live.
        epoch: epochs completed before the pass. stored: the target comes from a store.
    """

    prob_BC: torch.Tensor
    truth_BC: torch.Tensor
    teacher: Outputs | None = None
    epoch: int = 0
    stored: bool = False

    def take(self, rows: slice) -> Targets:
        """A slice of the batch."""
        return replace(
            self,
            prob_BC=self.prob_BC[rows],
            truth_BC=self.truth_BC[rows],
            teacher=None if self.teacher is None else self.teacher.take(rows),
        )

    def soft(self, temperature: float) -> torch.Tensor:
        """float32 (B, C): the teacher's probabilities at a temperature."""
        if self.stored:
            return self.prob_BC  # the run reads labels at this temperature
        assert self.teacher is not None
        return torch.softmax(self.teacher.logits.float() / temperature, dim=1)


@dataclass(frozen=True)
class Context:
    """Information for building a method.

    Attributes:
        classes: C. epochs: of the whole run. scores: width of the stored labels; C without any.
        student: example outputs of the student for one image, for their shapes.
        teacher: the same for the teacher or the stored features; None without either.
        student_network: the student. teacher_network: the live teacher, or None.
        features: settings of the stored features' part; None if they are live.
        teacher_facts: identity of the teacher, live or stored (`teachers.Teacher.facts`).
    """

    classes: int
    epochs: int
    scores: int
    student: Outputs
    student_network: nn.Module
    teacher: Outputs | None = None
    teacher_network: nn.Module | None = None
    features: FeatureSettings | None = None
    teacher_facts: dict[str, Any] | None = None


class Method(nn.Module):
    """Base class of all methods. Auxiliary modules are submodules, so they are trained too."""

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        """Named terms whose sum is minimised: (B,), one value per sample, or a scalar.

        Runs under autocast; numerically sensitive parts are computed in float32.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """Values of the last batch to log as metrics, such as a mask ratio."""
        return {}
