"""ScaleKD: match the last map of a transformer teacher with a student of any architecture.

It has three parts, which can be switched off. CAP: cross-attention projectors map the student's
map to the teacher's width and grid. DFM: a second path matches the maps without their spatial mean.
TPP: a proxy path sends the student's second-to-last map through the teacher's last stage; its
output is the query of the projectors of the last map.

Reference:
    Fan et al., "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers", equations 1 to 6
    and table 9; reductions and weights follow the authors' code (docs/methods.md lists the
    differences).

Letters: B batch, C channels of the teacher, H, W its last map.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, ValidationInfo, field_validator
from torch import nn

from fkdpipe.common import config
from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks import tails
from fkdpipe.networks.feature_layers import Needs, Outputs
from fkdpipe.networks.tails import Tail
from fkdpipe.train import losses
from fkdpipe.train.methods import parts
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets
from fkdpipe.train.methods.projectors import Attention, Cap, Plain

LAYER_NORMED = ("ConvNeXt", "SwinTransformer", "SwinTransformerV2")  # students, by class name


@config.settings
class Settings:
    """Parts and loss weights."""

    target: Literal["live", "stored"] = "live"
    """Source of the teacher's map: a live teacher, or the store (`generate --features map`), in
    which case only the tail of a live teacher runs."""
    projector: Literal["cap", "linear", "conv"] = "cap"
    """Projector of the student's map; linear and conv are for comparison."""
    dfm: bool = True
    """Add the path without the spatial mean."""
    tpp: bool = True
    """Add the proxy path; needs projector cap."""
    adaptive_queries: bool = True
    """Take the queries from the proxy path; false learns them."""
    spatial_weight: NonNegativeFloat = 3.92
    """Weight of the first path, on means over positions. The authors' code has 0.08 on sums over 49
    positions, and 0.02 on sums over 196."""
    frequency_weight: NonNegativeFloat = 2.94
    """Weight of the second path, likewise; 0.06 and 0.015 in the authors' code."""
    soft_weight: NonNegativeFloat = 0.5
    """Weight of the cross-entropy with the teacher's probabilities."""
    hard_weight: NonNegativeFloat | None = None
    """Weight of the cross-entropy with the ground truth; default: 1 - soft_weight, as in the
    authors' code (1 in the paper)."""
    heads: tuple[PositiveInt, PositiveInt] | None = None
    """Attention heads of the projectors of the second-to-last and the last map; default: one per
    128 channels."""
    softmax_scale: PositiveFloat = 5.0
    """Factor on the attention scores; the authors use 5 for Swin teachers and 1 for others."""
    stem_norm: Literal["auto", "batch", "layer"] = "auto"
    """Norm of the projectors' stem; auto: layer norm for ConvNeXt and Swin students, else batch
    norm."""
    tail_blocks: PositiveInt = 2
    """Blocks in the tail of a plain transformer; the tail of a Swin is its last stage."""

    @field_validator("tpp")
    @classmethod
    def _queries_are_taken(cls, tpp: bool, info: ValidationInfo) -> bool:
        projector = info.data.get("projector", "cap")
        if tpp and projector != "cap":
            raise UsageError(
                f"the proxy path provides queries, which projector {projector} does not take: set "
                "tpp = false, or projector = cap"
            )
        return tpp

    @field_validator("hard_weight")
    @classmethod
    def _rest_of_one(cls, hard_weight: float | None, info: ValidationInfo) -> float | None:
        soft_weight = info.data.get("soft_weight", 0.0)
        if hard_weight is None and soft_weight > 1:
            raise UsageError(
                f"defaults to 1 - soft_weight, but soft_weight is {soft_weight}: set hard_weight, "
                "or a soft_weight between 0 and 1"
            )
        return hard_weight

    @property
    def paths(self) -> dict[str, float]:
        """Weights of the paths, by name."""
        paths = {"spatial": self.spatial_weight}
        return paths | {"frequency": self.frequency_weight} if self.dfm else paths


def needs(settings: Settings) -> MethodNeeds:
    stored = settings.target == "stored"
    return MethodNeeds(
        student=Needs(stages=(2,) if settings.tpp else (), final=True),
        teacher=Needs(final=True),
        soft=1.0 if settings.soft_weight else None,
        live=settings.tpp or not stored,
        stored=stored,
    )


def spatial(map_BCHW: torch.Tensor, target_BCHW: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """float32 (B,): squared distance of unit-length channel vectors, mean over positions.

    0 for equal directions, 2 for orthogonal and 4 for opposite ones.
    """
    unit = nn.functional.normalize(map_BCHW.float(), dim=1, eps=eps)
    target = nn.functional.normalize(target_BCHW.float(), dim=1, eps=eps)
    return (unit - target).square().sum(dim=1).mean(dim=(1, 2))


def frequency(map_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
    """float32 (B,): `spatial` without the zero frequency of the maps' cosine transform.

    That is, after subtracting the mean of each channel over the map.
    """
    return spatial(without_mean(map_BCHW), without_mean(target_BCHW), eps=1e-6)


def without_mean(map_BCHW: torch.Tensor) -> torch.Tensor:
    """float32, the map minus the mean of each channel."""
    map_BCHW = map_BCHW.float()
    return map_BCHW - map_BCHW.mean(dim=(2, 3), keepdim=True)


DISTANCES = {"spatial": spatial, "frequency": frequency}


class ScaleKd(Method):
    """ScaleKD's loss, with projectors for each path. The teacher's tail is not a submodule."""

    def __init__(
        self,
        settings: Settings,
        student: Outputs,
        teacher_map: torch.Tensor,
        tail: Tail | None,
        *,
        layer_norm: bool,
    ) -> None:
        super().__init__()
        self.settings, self.tail = settings, tail
        assert student.final is not None
        width, grid = teacher_map.shape[1], parts.grid_of(teacher_map)
        heads = settings.heads or (None, None)
        self.last = nn.ModuleDict(
            {
                name: _projector(
                    settings,
                    student.final,
                    width,
                    grid,
                    Attention(heads[1], settings.softmax_scale, layer_norm),
                    own_query=tail is None or not settings.adaptive_queries,
                )
                for name in settings.paths
            }
        )
        if tail is None:
            return
        grid = (grid[0] * tail.stride, grid[1] * tail.stride)
        attention = Attention(heads[0], settings.softmax_scale, layer_norm)
        self.proxy = nn.ModuleDict(
            {
                name: _projector(
                    settings, student.stages[2], tail.channels, grid, attention, own_query=True
                )
                for name in settings.paths
            }
        )

    def loss(self, student: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        s = self.settings
        assert targets.teacher is not None
        assert targets.teacher.final is not None
        assert student.final is not None
        target = targets.teacher.final.detach()
        hard = losses.soft_cross_entropy(student.logits, targets.truth_BC)
        terms = {"hard": (1 - s.soft_weight if s.hard_weight is None else s.hard_weight) * hard}
        if s.soft_weight:
            soft = losses.soft_cross_entropy(student.logits, targets.soft(1.0))
            terms["kd"] = s.soft_weight * soft
        for name, weight in s.paths.items():
            distance = DISTANCES[name]
            query = None
            if self.tail is not None:
                proxy = self.tail(self.proxy[name](student.stages[2]))
                terms[f"proxy_{name}"] = weight * distance(proxy, target)
                query = proxy if s.adaptive_queries else None
            projected = self.last[name](student.final, query)
            terms[name] = weight * distance(projected, target)
        return terms


def build(settings: Settings, context: Context) -> ScaleKd:
    """Raises ModelError if the teacher has no tail for the proxy path."""
    teacher = parts.teacher_side(context.teacher, "scalekd")
    assert teacher.final is not None
    tail = None
    if settings.tpp:
        if context.teacher_network is None:
            raise ModelError(
                "scalekd with tpp needs the teacher's last stage: --teacher NAME=FILE."
            )
        tail = tails.of(context.teacher_network, settings.tail_blocks)
    layer_norm = settings.stem_norm == "layer"
    if settings.stem_norm == "auto":
        layer_norm = type(context.student_network).__name__ in LAYER_NORMED
    return ScaleKd(settings, context.student, teacher.final, tail, layer_norm=layer_norm)


def _projector(
    settings: Settings,
    student_map: torch.Tensor,
    width: int,
    grid: tuple[int, int],
    attention: Attention,
    *,
    own_query: bool,
) -> nn.Module:
    channels, height, wide = (int(n) for n in student_map.shape[1:])
    if settings.projector == "cap":
        return Cap((channels, height, wide), width, grid, attention, own_query=own_query)
    return Plain(channels, width, grid, conv=settings.projector == "conv")
