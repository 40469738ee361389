"""What a method is to the trainer.

A method says what it needs, holds its trained auxiliary modules, and turns the outputs of student
and teacher into named loss terms. Whether the teacher's side comes from a store or from a live
model is not its business.
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
    """What a method asks for.

    Attributes:
        student: feature layers of the student.
        teacher: feature layers of the teacher beyond its logits, from a live teacher or
            from stored features; None when it asks for none.
        soft: temperature at which the teacher's probabilities are wanted, None for none. They
            come from the store when the run's target does, else from a live teacher.
        live: only a live teacher will do, for example for its last stage.
        stored: the teacher's side comes from the store; a live teacher only lends its layers, and
            nothing is asked of it.
        classifier: whether the student's logits are in the loss; without, its classifier rests.
        independent: no two crops of one image in a batch, for losses that couple the batch.
        least: crops that a process must see at once, of losses with statistics over the batch.
        mixing: whether mixup and CutMix make sense.
        scores: whether the stored labels may be scores of something else than the classes.
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
    """What a batch is to be: on the device, float32, B crops.

    Attributes:
        prob_BC: probabilities of the run's target; one-hot for ground truth.
        truth_BC: one-hot of the folder's classes, mixed where the pixels are.
        teacher: what the method asked of the teacher, without gradients; logits only when live.
        epoch: epochs done at the beginning of the pass. stored: the target comes from a store.
    """

    prob_BC: torch.Tensor
    truth_BC: torch.Tensor
    teacher: Outputs | None = None
    epoch: int = 0
    stored: bool = False

    def take(self, rows: slice) -> Targets:
        """A part of the batch."""
        return replace(
            self,
            prob_BC=self.prob_BC[rows],
            truth_BC=self.truth_BC[rows],
            teacher=None if self.teacher is None else self.teacher.take(rows),
        )

    def soft(self, temperature: float) -> torch.Tensor:
        """float32 (B, C): the teacher's probabilities at a temperature."""
        if self.stored:
            return self.prob_BC  # read at this temperature: the run has seen to it
        assert self.teacher is not None
        return torch.softmax(self.teacher.logits.float() / temperature, dim=1)


@dataclass(frozen=True)
class Context:
    """What a method may know when it is built.

    Attributes:
        classes: C. epochs: of the whole run. scores: width of the stored labels, C without any.
        student: outputs of the student for one image; their shapes count.
        teacher: the same of the teacher or of the stored features, None without.
        student_network: the student itself. teacher_network: the live teacher, None without one.
        features: settings of the stored features' part, None when live.
        teacher_facts: which teacher it is, live or stored (`teachers.Teacher.facts`).
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
    """Base of all methods: a module, so that its trained auxiliary modules are its parameters."""

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        """Named terms whose sum is optimised: (B,) one value per sample, or a scalar.

        Runs under autocast; what is sensitive is computed in float32.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """Numbers of the last batch worth a place in the metrics, such as a mask ratio."""
        return {}
