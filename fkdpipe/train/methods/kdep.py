"""KDEP: pre-train a student on a teacher's penultimate features, without labels.

The teacher's D_t features before the last activation are aligned with the student's width D_s,
    svd             leading principal components of the centred features (`fkdpipe fit-basis`)
    variance        channels of largest standard deviation, from the same basis file
    random          random channels
    interpolation   nearest neighbours along the channels
    conv-post       a 1x1 convolution and batch normalisation on the student, after its last ReLU
    conv-pre        the same before its last ReLU
then transformed (PTS, SN, SM or none), and matched: w mean_d (z_d - y_d)^2.

The paper convolves maps; here a linear layer maps the pooled vectors. Both agree up to the batch
normalisation, whose statistics are those of the pooled vectors here.

Reference:
    He et al., "Knowledge Distillation as Efficient Pre-training: Faster Convergence, Higher
    Data-efficiency, and Better Transferability", section 3 and appendix.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import PositiveFloat, ValidationInfo, field_validator
from torch import distributed, nn

from fkdpipe.common import config
from fkdpipe.common.errors import ModelError, StoreMismatchError, UsageError
from fkdpipe.networks import feature_layers, features
from fkdpipe.networks.feature_layers import Needs, Outputs
from fkdpipe.networks.features import Basis
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets

Alignment = Literal["svd", "variance", "random", "interpolation", "conv-post", "conv-pre"]

FIRST_LOSS = 6.9  # ln 1000, the initial loss of supervised training on ImageNet


@config.settings
class Settings:
    """Alignment of the teacher's features, and the loss weight."""

    alignment: Alignment = "svd"
    """Alignment with the student's width: principal components, channels of largest variance,
    random or interpolated channels, or a 1 x 1 convolution of the student's features."""
    transformation: Literal["auto", "pts", "sn", "sm", "none"] = "auto"
    """Transformation of the aligned features; auto: pts for svd, else none, as in the paper."""
    temperature: PositiveFloat = 0.1
    """Temperature T of PTS."""
    power: PositiveFloat = 3.0
    """Power n of PTS."""
    feature_weight: PositiveFloat | Literal["auto"] = "auto"
    """Loss weight w; auto: 6.9 / loss of the first batch."""
    basis: Path | None = None
    """File written by fit-basis; stored components need it only for sn and sm."""
    seed: int = 0
    """Seed of alignment random."""

    @field_validator("transformation")
    @classmethod
    def _of_components(cls, transformation: str, info: ValidationInfo) -> str:
        alignment = info.data.get("alignment", "svd")
        if alignment != "svd" and transformation not in ("auto", "none"):
            raise UsageError(
                f"{transformation} applies to the components of alignment svd; set "
                f"transformation = none for {alignment}"
            )
        return transformation

    @property
    def resolved_transformation(self) -> str:
        if self.transformation != "auto":
            return self.transformation
        return "pts" if self.alignment == "svd" else "none"


def needs(settings: Settings) -> MethodNeeds:
    layer = Needs(penultimate=True) if settings.alignment == "conv-post" else Needs(pre=True)
    return MethodNeeds(student=layer, teacher=layer, classifier=False, mixing=False)


class Kdep(Method):
    """KDEP's loss.

    Args:
        align: maps teacher features (B, D) to (B, D_s or D_t), float32.
        transform: applied to the aligned features. project: applied to the student's features.
    """

    weight: torch.Tensor

    def __init__(
        self,
        settings: Settings,
        align: Callable[[torch.Tensor], torch.Tensor],
        transform: Callable[[torch.Tensor], torch.Tensor],
        project: nn.Module,
    ) -> None:
        super().__init__()
        self.align, self.transform, self.project = align, transform, project
        self.post = settings.alignment == "conv-post"
        # Set by the first batch, or by a checkpoint.
        self._weight_pending = settings.feature_weight == "auto"
        start = float("nan") if settings.feature_weight == "auto" else settings.feature_weight
        self.register_buffer("weight", torch.tensor(start))  # saved in checkpoints

    def target(self, teacher: Outputs) -> torch.Tensor:
        """float32: the target of the student's features."""
        vectors_BD = teacher.penultimate if self.post else teacher.pre
        assert vectors_BD is not None
        with torch.no_grad(), torch.autocast(vectors_BD.device.type, enabled=False):
            return self.transform(self.align(vectors_BD.float()))

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        assert targets.teacher is not None
        features_BD = student.penultimate if self.post else student.pre
        assert features_BD is not None
        difference = self.project(features_BD).float() - self.target(targets.teacher)
        value_B = difference.square().mean(dim=1)
        if self.training and self._weight_pending:
            self._weight_pending = False
            if self.weight.isnan():
                self._fix_weight(value_B)
        return {"kdep": self.weight * value_B}

    def _fix_weight(self, value_B: torch.Tensor) -> None:
        first = value_B.detach().mean()
        if distributed.is_initialized():  # the same weight in all processes
            distributed.all_reduce(first)
            first /= distributed.get_world_size()
        self.weight.copy_(FIRST_LOSS / first)

    def facts(self) -> dict[str, float]:
        return {"kdep_weight": float(self.weight)}


def build(settings: Settings, context: Context) -> Kdep:
    """Raises UsageError or ModelError if features, basis and student do not fit together."""
    assert context.teacher is not None
    basis = features.load_basis(settings.basis) if settings.basis else None
    if basis is not None:
        _check_basis(basis, context)
    if settings.alignment in ("conv-post", "conv-pre"):
        return _parametric(settings, context)
    assert context.student.pre is not None
    width = context.student.pre.shape[1]
    align = _alignment(settings, context, basis, width)
    return Kdep(settings, align, _transformation(settings, basis, width), nn.Identity())


def _parametric(settings: Settings, context: Context) -> Kdep:
    _raw_width(settings, context)
    post = settings.alignment == "conv-post"
    assert context.teacher is not None
    student_features, teacher_features = (
        o.penultimate if post else o.pre for o in (context.student, context.teacher)
    )
    assert student_features is not None
    assert teacher_features is not None
    width = teacher_features.shape[1]
    project = nn.Sequential(
        nn.Linear(student_features.shape[1], width, bias=False), _BatchNorm(width)
    )
    return Kdep(settings, nn.Identity(), nn.Identity(), project)


def _alignment(
    settings: Settings, context: Context, basis: Basis | None, width: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    kind = settings.alignment
    if kind == "svd":
        return _components(context, basis, width)
    channels = _raw_width(settings, context)
    if kind == "interpolation":
        return lambda x_BD: features.interpolate(x_BD, width)
    if kind == "random":
        channel_index = features.random_channels(channels, width, settings.seed)
    else:
        channel_index = features.leading_channels(
            _required(basis, "alignment variance").channel_std_D, width
        )
    return lambda x_BD: x_BD[:, torch.from_numpy(channel_index).to(x_BD.device)]


def _components(
    context: Context, basis: Basis | None, width: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    stored = context.features
    if stored is not None and stored.basis is not None:
        if width > stored.dims:
            raise StoreMismatchError(
                f"the student's width is {width}, but the store holds {stored.dims} components. "
                f"Generate features pre:{width} or more, or use a narrower student.",
                code="features",
            )
        if basis is not None and basis.digest != stored.basis:
            raise StoreMismatchError(
                "the stored components belong to a different basis than method.basis.",
                code="features",
            )
        return lambda x_BK: x_BK[:, :width]
    basis = _required(basis, "alignment svd of whole vectors")
    basis.check_components(width)
    mean, axes = _Constant(basis.mean_D), _Constant(basis.components_DK[:, :width])
    return lambda x_BD: (x_BD - mean.on(x_BD.device)) @ axes.on(x_BD.device)


def _transformation(
    settings: Settings, basis: Basis | None, width: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    kind = settings.resolved_transformation
    if kind == "none":
        return nn.Identity()
    if kind == "pts":
        return lambda f: features.pts(f, settings.temperature, settings.power)
    basis = _required(basis, f"transformation {kind}")
    basis.check_components(width)
    std = _Constant(basis.std_K[:width])
    if kind == "sn":
        return lambda f: features.scale_normalise(f, std.on(f.device))
    target_std = _Constant(features.target_std(basis, width))
    return lambda f: features.std_match(f, std.on(f.device), target_std.on(f.device))


def _raw_width(settings: Settings, context: Context) -> int:
    """D_t, the width of the teacher's own channels.

    Raises:
        StoreMismatchError: the store holds components only.
    """
    if context.features is not None and context.features.basis is not None:
        raise StoreMismatchError(
            f"alignment {settings.alignment} needs the teacher's own channels, but the store "
            "holds components of a basis. Generate --features pre, without :D.",
            code="features",
        )
    assert context.teacher is not None
    teacher = context.teacher
    features_BD = teacher.pre if teacher.pre is not None else teacher.penultimate
    assert features_BD is not None
    return int(features_BD.shape[1])


def _check_basis(basis: Basis, context: Context) -> None:
    facts = context.teacher_facts
    assert facts is not None
    basis.check_teacher(facts)
    if context.features is not None:
        same = context.features.pre_is_post
    else:
        same = not feature_layers.has_activation(context.teacher_network)
    if basis.facts["tap"] != "pre" and not same:
        raise ModelError(
            "the basis was fitted on features after the last activation; KDEP needs those before "
            "it: fkdpipe fit-basis --layer pre.",
            code="other-layer",
        )


def _required(basis: Basis | None, what: str) -> Basis:
    if basis is None:
        raise UsageError(f"{what} needs a basis: fkdpipe fit-basis, then --set method.basis=FILE.")
    return basis


class _BatchNorm(nn.BatchNorm1d):
    """Uses running statistics for a batch of one vector, which may end a pass."""

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        if len(x_BD) > 1:
            return super().forward(x_BD)
        return nn.functional.batch_norm(
            x_BD, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class _Constant:
    """An array of a basis in float32, moved to the device once."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def on(self, device: torch.device) -> torch.Tensor:
        if self._values.device != device:
            self._values = self._values.to(device)
        return self._values
