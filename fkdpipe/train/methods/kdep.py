"""KDEP: a student pre-trained on a teacher's penultimate features, without labels.

The teacher's D_t features before the last activation are brought to the student's width D_s,
    svd             leading principal components of the centred features (`fkdpipe fit-basis`)
    variance        the channels of largest deviation, from the same basis file
    random          channels at random
    interpolation   nearest neighbours along the channels
    conv-post       a 1x1 convolution and batch normalisation on the student, after its last ReLU
    conv-pre        the same before it
then transformed (PTS, SN, SM or nothing), and matched: w mean_d (z_d - y_d)^2.

The paper convolves maps; here the pooled vectors go through the linear layer, which is the same
before the normalisation, whose statistics are then those of the pooled vectors.

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

FIRST_LOSS = 6.9  # ln 1000: where supervised pre-training on ImageNet begins


@config.settings
class Settings:
    """How the teacher's features become the student's width, and the weight of the loss."""

    alignment: Alignment = "svd"
    """To the student's width: leading components, the channels of largest variance, random or
    interpolated ones, or a 1 x 1 convolution of the student's features."""
    transformation: Literal["auto", "pts", "sn", "sm", "none"] = "auto"
    """Of the aligned features; auto is pts after svd and none after other alignments, as in the
    paper."""
    temperature: PositiveFloat = 0.1
    """T of PTS."""
    power: PositiveFloat = 3.0
    """n of PTS."""
    feature_weight: PositiveFloat | Literal["auto"] = "auto"
    """w, or auto: 6.9 / the first loss, then fixed."""
    basis: Path | None = None
    """File of fit-basis; not needed for stored components, except by sn and sm."""
    seed: int = 0
    """Of the alignment random."""

    @field_validator("transformation")
    @classmethod
    def _of_components(cls, transformation: str, info: ValidationInfo) -> str:
        alignment = info.data.get("alignment", "svd")
        if alignment != "svd" and transformation not in ("auto", "none"):
            raise UsageError(
                f"{transformation} is for the components of alignment svd; {alignment} keeps the "
                "channels as they are: take none"
            )
        return transformation

    @property
    def transformed_by(self) -> str:
        if self.transformation != "auto":
            return self.transformation
        return "pts" if self.alignment == "svd" else "none"


def needs(settings: Settings) -> MethodNeeds:
    layer = Needs(penultimate=True) if settings.alignment == "conv-post" else Needs(pre=True)
    return MethodNeeds(student=layer, teacher=layer, classifier=False, mixing=False)


class Kdep(Method):
    """The loss.

    Args:
        align: (B, D) teacher features -> (B, D_s or D_t) float32.
        transform: what is done to them then. project: of the student's features.
        post: features after the last activation are matched, not before it.
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
        self._open = (
            settings.feature_weight == "auto"
        )  # until a batch, or a checkpoint, has fixed it
        start = float("nan") if settings.feature_weight == "auto" else settings.feature_weight
        self.register_buffer("weight", torch.tensor(start))  # in the checkpoint: fixed for good

    def target(self, teacher: Outputs) -> torch.Tensor:
        """float32: what the student's features are to be."""
        vectors_BD = teacher.penultimate if self.post else teacher.pre
        assert vectors_BD is not None
        with torch.no_grad(), torch.autocast(vectors_BD.device.type, enabled=False):
            return self.transform(self.align(vectors_BD.float()))

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        assert targets.teacher is not None
        made = student.penultimate if self.post else student.pre
        assert made is not None
        difference = self.project(made).float() - self.target(targets.teacher)
        value_B = difference.square().mean(dim=1)
        if self.training and self._open:
            self._open = False
            if self.weight.isnan():
                self._fix_weight(value_B)
        return {"kdep": self.weight * value_B}

    def _fix_weight(self, value_B: torch.Tensor) -> None:
        first = value_B.detach().mean()
        if distributed.is_initialized():  # one weight for all processes
            distributed.all_reduce(first)
            first /= distributed.get_world_size()
        self.weight.copy_(FIRST_LOSS / first)

    def facts(self) -> dict[str, float]:
        return {"kdep_weight": float(self.weight)}


def build(settings: Settings, context: Context) -> Kdep:
    """Raises UsageError or ModelError when features, basis and student do not go together."""
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
    ours, theirs = (o.penultimate if post else o.pre for o in (context.student, context.teacher))
    assert ours is not None
    assert theirs is not None
    width = theirs.shape[1]
    project = nn.Sequential(nn.Linear(ours.shape[1], width, bias=False), _BatchNorm(width))
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
        chosen = features.random_channels(channels, width, settings.seed)
    else:
        chosen = features.leading_channels(
            _required(basis, "alignment variance").channel_std_D, width
        )
    return lambda x_BD: x_BD[:, torch.from_numpy(chosen).to(x_BD.device)]


def _components(
    context: Context, basis: Basis | None, width: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    stored = context.features
    if stored is not None and stored.basis is not None:
        if width > stored.dims:
            raise StoreMismatchError(
                f"the student is {width} wide, and the store keeps {stored.dims} components. "
                f"Generate features pre:{width} or more, or take a narrower student.",
                code="features",
            )
        if basis is not None and basis.digest != stored.basis:
            raise StoreMismatchError(
                "the stored components belong to another basis than the file that is named.",
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
    kind = settings.transformed_by
    if kind == "none":
        return nn.Identity()
    if kind == "pts":
        return lambda f: features.pts(f, settings.temperature, settings.power)
    basis = _required(basis, f"transformation {kind}")
    basis.check_components(width)
    std = _Constant(basis.std_K[:width])
    if kind == "sn":
        return lambda f: features.scale_normalise(f, std.on(f.device))
    wanted = _Constant(features.target_std(basis, width))
    return lambda f: features.std_match(f, std.on(f.device), wanted.on(f.device))


def _raw_width(settings: Settings, context: Context) -> int:
    """D_t, of features that are no components.

    Raises:
        StoreMismatchError: the store keeps components only.
    """
    if context.features is not None and context.features.basis is not None:
        raise StoreMismatchError(
            f"alignment {settings.alignment} works on the teacher's own channels, and the store "
            "keeps components of a basis. Generate --features pre, without :D.",
            code="features",
        )
    assert context.teacher is not None
    given = context.teacher.pre if context.teacher.pre is not None else context.teacher.penultimate
    assert given is not None
    return int(given.shape[1])


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
            "the basis was fitted on features after the last activation; KDEP takes those before "
            "it: fkdpipe fit-basis --layer pre.",
            code="other-layer",
        )


def _required(basis: Basis | None, what: str) -> Basis:
    if basis is None:
        raise UsageError(f"{what} needs a basis: fkdpipe fit-basis, then --set method.basis=FILE.")
    return basis


class _BatchNorm(nn.BatchNorm1d):
    """With running statistics for a single vector, in which a pass over the images may end."""

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        if len(x_BD) > 1:
            return super().forward(x_BD)
        return nn.functional.batch_norm(
            x_BD, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class _Constant:
    """Numbers of a basis in float32, moved to a device once."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def on(self, device: torch.device) -> torch.Tensor:
        if self._values.device != device:
            self._values = self._values.to(device)
        return self._values
