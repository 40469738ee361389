"""SRD: a linear projector, batch normalisation without parameters, and a soft maximum.

With p = W z_s (the student's projected features), ^ for batch normalisation, and d = p^ - z_t^ over
all B samples and D dimensions,
    form elementwise   L_rep = log(sum_bd |d_bd|^alpha)
    form corr          L_rep = log(sum_d |c_d - 1|^alpha + 1e-5), c_d = mean_b p^_bd z_t^_bd
    loss               CE + 2 L_rep + KL (T = 1); weight 1 for corr, as in the authors' DeiT code

Both normalisations, the teacher's too, always use batch statistics and are never in eval mode. They
couple the batch, so its crops must come from distinct images.

Reference:
    Miles and Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation"
    ("A closer look at the training dynamics of knowledge distillation"), equation 12.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationInfo, field_validator
from torch import nn
from torch.nn import functional

from fkdpipe.common import config
from fkdpipe.common.errors import UsageError
from fkdpipe.networks.feature_layers import Needs, Outputs
from fkdpipe.train import losses
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets

Normalisation = Literal["bn", "group", "l2", "none"]

_MIN_EPS = 1e-10  # for form corr: a constant channel stays 0, with a bounded gradient
_TINY = 1e-12  # times the number of elements; keeps the logarithm finite for equal features


@config.settings
class Settings:
    """Distance of the representations, and loss weights."""

    form: Literal["elementwise", "corr"] = "elementwise"
    """Form of the distance: over all elements, or over the correlation of each dimension."""
    alpha: Annotated[float, Field(ge=1)] = 4.0
    """Exponent of the soft maximum."""
    log: bool = True
    """Take the logarithm of the sum; false uses the mean of |d|^alpha."""
    normalise: Normalisation = "bn"
    """Normalisation of student and teacher features; form corr needs bn."""
    groups: PositiveInt = 32
    """Number of groups of normalise group."""
    projector: Literal["linear", "mlp"] = "linear"
    """linear, or mlp with one hidden layer."""
    hidden: PositiveInt = 1024
    """Hidden units of the mlp."""
    student: Literal["penultimate", "tokens"] = "penultimate"
    """Student features; tokens: the mean of a transformer's patch tokens after the final norm, as
    in the authors' DeiT code."""
    feature_weight: NonNegativeFloat | None = None
    """Weight of L_rep; default: 2, or 1 with form corr."""
    hard_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropy with the ground truth."""
    soft_weight: NonNegativeFloat = 1.0
    """Weight of the KL divergence from the teacher's probabilities."""

    @field_validator("normalise")
    @classmethod
    def _over_the_batch(cls, normalise: str, info: ValidationInfo) -> str:
        if info.data.get("form") == "corr" and normalise != "bn":
            raise UsageError("form corr correlates over the batch and needs normalise = bn")
        return normalise

    @property
    def rep_weight(self) -> float:
        default = 1.0 if self.form == "corr" else 2.0
        return default if self.feature_weight is None else self.feature_weight

    @property
    def eps(self) -> float:
        """Epsilon of the batch normalisation, as in the authors' ImageNet and DeiT code."""
        return 0.0 if self.form == "corr" else 1e-4


def needs(settings: Settings) -> MethodNeeds:
    tokens = settings.student == "tokens"
    return MethodNeeds(
        student=Needs(penultimate=not tokens, final=tokens),
        teacher=Needs(penultimate=True),
        soft=1.0 if settings.soft_weight else None,
        independent=True,
        least=2 if settings.normalise == "bn" else 1,
    )


class Srd(Method):
    def __init__(self, settings: Settings, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.settings = settings
        self.projector = _projector(settings, student_width, teacher_width)

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        s = self.settings
        assert targets.teacher is not None
        assert targets.teacher.penultimate is not None
        projected_BD = self.projector(_represent(student, s))
        terms = {"rep": s.rep_weight * self.distance(projected_BD, targets.teacher.penultimate)}
        if s.hard_weight:
            hard_B = losses.soft_cross_entropy(student.logits, targets.truth_BC)
            terms["hard"] = s.hard_weight * hard_B
        if s.soft_weight:
            soft_B = losses.kl_divergence(student.logits, targets.soft(1.0))
            terms["soft"] = s.soft_weight * soft_B
        return terms

    def distance(self, projected_BD: torch.Tensor, teacher_BD: torch.Tensor) -> torch.Tensor:
        """float32 scalar: L_rep, one value for the whole batch."""
        s = self.settings
        if s.normalise == "bn" and len(projected_BD) < 2:
            return (
                0.0 * projected_BD.float().sum()
            )  # one crop, at the end of a pass, has no batch statistics
        with torch.autocast(projected_BD.device.type, enabled=False):  # |d|^4 needs the range
            student_normed, teacher_normed = (
                normalise(x.float(), s) for x in (projected_BD, teacher_BD.detach())
            )
            if s.form == "corr":
                return correlation_distance(student_normed, teacher_normed, s.alpha)
            return (
                log_sum(student_normed - teacher_normed, s.alpha)
                if s.log
                else mean_power(student_normed - teacher_normed, s.alpha)
            )


def log_sum(difference_BD: torch.Tensor, alpha: float) -> torch.Tensor:
    """Scalar: log(sum |d|^alpha) over batch and dimensions.

    Its gradient g satisfies <d, g> = alpha whatever the scale of d.
    """
    total = difference_BD.abs().pow(alpha).sum()
    return torch.log(total + _TINY * difference_BD.numel())


def mean_power(difference_BD: torch.Tensor, alpha: float) -> torch.Tensor:
    """Scalar: mean |d|^alpha, without the soft maximum (the paper's "w/o LogSum")."""
    return difference_BD.abs().pow(alpha).mean()


def correlation_distance(
    student_BD: torch.Tensor, teacher_BD: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Scalar: log(sum_d |c_d - 1|^alpha + 1e-5), with c_d the correlation of dimension d."""
    correlation_D = (student_BD * teacher_BD).mean(dim=0)
    return torch.log((correlation_D - 1).abs().pow(alpha).sum() + 1e-5)


def normalise(features_BD: torch.Tensor, settings: Settings) -> torch.Tensor:
    """(B, D), normalised over the batch (bn), within each sample (l2, group) or not (none)."""
    kind = settings.normalise
    if kind == "bn":
        eps = max(settings.eps, _MIN_EPS)
        return functional.batch_norm(features_BD, None, None, training=True, eps=eps)
    if kind == "group":
        return functional.group_norm(features_BD, settings.groups)
    if kind == "l2":
        return functional.normalize(features_BD, dim=1)
    return features_BD


def _represent(student: Outputs, settings: Settings) -> torch.Tensor:
    if settings.student == "tokens":
        assert student.final is not None
        return student.final.mean(dim=(2, 3))
    assert student.penultimate is not None
    return student.penultimate


def _projector(settings: Settings, student_width: int, teacher_width: int) -> nn.Module:
    if settings.projector == "linear":
        return nn.Linear(student_width, teacher_width)
    return nn.Sequential(
        nn.Linear(student_width, settings.hidden),
        nn.ReLU(),
        nn.Linear(settings.hidden, teacher_width),
    )


def build(settings: Settings, context: Context) -> Srd:
    """Raises UsageError if the features are components of a basis, or groups do not divide them."""
    assert context.teacher is not None
    assert context.teacher.penultimate is not None
    width = context.teacher.penultimate.shape[1]
    if context.features is not None and context.features.basis is not None:
        raise UsageError(
            "srd normalises the teacher's own channels, but the store holds components of a "
            "basis. Generate --features post, without :D."
        )
    if settings.normalise == "group" and width % settings.groups:
        raise UsageError(f"{width} channels do not divide into {settings.groups} groups.")
    return Srd(settings, _represent(context.student, settings).shape[1], width)
