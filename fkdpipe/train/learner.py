"""Student and method as one module, so that DDP and torch.compile see every forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fkdpipe.networks import feature_layers
from fkdpipe.networks.feature_layers import FeatureNetwork
from fkdpipe.networks.models import Loaded
from fkdpipe.networks.teachers import Teacher
from fkdpipe.train import methods, stored
from fkdpipe.train.data import TrainingSet
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets
from fkdpipe.train.settings import TrainSettings


class Learner(nn.Module):
    """Map pixels and targets to logits and named loss terms.

    The teacher is not a submodule, so it is neither trained nor switched to training mode.

    Args:
        probe: train only the student's classifier; the rest stays in eval mode.
    """

    def __init__(self, student: FeatureNetwork, method: Method, *, probe: bool = False) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self._probe = probe
        if probe:
            student.requires_grad_(False)
            student.classifier.requires_grad_(True)

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        if self._probe:
            self.student.eval()
        return self

    def forward(
        self, pixels_B3HW: torch.Tensor, targets: Targets
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs = self.student(pixels_B3HW)
        return outputs.logits, self.method.loss(outputs, targets)


def build(
    settings: TrainSettings,
    needs: MethodNeeds,
    loaded: Loaded,
    teacher: Teacher | None,
    training: TrainingSet,
    device: torch.device,
) -> Learner:
    """Build the student and a method that fits it and the teacher's outputs.

    Raises:
        UsageError, ModelError: the method cannot combine these networks.
    """
    student = FeatureNetwork(loaded.module, needs.student)
    if not needs.classifier:  # unused parameters would make DDP wait
        student.classifier.requires_grad_(False)
    teacher_outputs = None
    if training.features is not None:
        if teacher is not None:
            stored.check_teacher(training.features.settings, teacher.facts())
        teacher_outputs = training.features.outputs(training.features.example(device))
    elif teacher is not None:
        size = teacher.preprocessing.size
        teacher_outputs = feature_layers.example(teacher.module, size, device)
    context = Context(
        classes=loaded.classes,
        epochs=settings.epochs,
        scores=training.labels.classes if training.labels else loaded.classes,
        student=feature_layers.example(student, loaded.preprocessing.size, device),
        student_network=loaded.module,
        teacher=teacher_outputs,
        teacher_network=teacher.module.network if teacher else None,
        features=training.features.settings if training.features else None,
        teacher_facts=_teacher_facts(teacher, training),
    )
    torch.manual_seed(settings.seed + 1)  # weights of the auxiliary modules
    probe = settings.train_only == "classifier"
    return Learner(student, methods.build(settings.method, context), probe=probe).to(device)


def parameters(learner: Learner) -> dict[str, int]:
    """Parameter counts of the student and of the method's auxiliary modules."""
    return {
        "student": sum(p.numel() for p in learner.student.parameters()),
        "auxiliary": sum(p.numel() for p in learner.method.parameters()),
    }


def _teacher_facts(teacher: Teacher | None, training: TrainingSet) -> dict[str, Any] | None:
    if teacher is not None:
        return teacher.facts()
    return training.features.settings.teachers[0] if training.features else None
