"""ScaleKD: a student of any architecture imitates the last map of a transformer teacher.

Three parts, each with its switch. CAP: cross-attention projectors bring the student's map to the
teacher's width and grid. DFM: a second path imitates the map without its spatial mean, the
frequencies that the mean hides. TPP: a proxy path sends the student's last but one map through the
teacher's own last stage, and what comes out is the query of the projectors of the last map.

Reference:
    Fan et al., "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers", equations 1 to 6
    and table 9; reductions and weights as in the authors' code (docs/methods.md lists where the
    two differ).

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

LAYER_NORMED = ("ConvNeXt", "SwinTransformer", "SwinTransformerV2")  # students, by class


@config.settings
class Settings:
    """Switches and weights."""

    target: Literal["live", "stored"] = "live"
    """Where the teacher's map comes from: a teacher beside the student, or the store (`generate
    --features map`); of a teacher given too only the tail runs then."""
    projector: Literal["cap", "linear", "conv"] = "cap"
    """cap, or linear or conv to compare."""
    dfm: bool = True
    """The second path."""
    tpp: bool = True
    """The proxy path; needs projector cap."""
    adaptive_queries: bool = True
    """The proxy path gives the queries; false learns fixed ones."""
    spatial_weight: NonNegativeFloat = 3.92
    """Of the first path, on means over the map's positions. The code's 0.08 is on sums over 49
    positions, its 0.02 over 196."""
    frequency_weight: NonNegativeFloat = 2.94
    """Of the second path, likewise; the code's 0.06 and 0.015."""
    soft_weight: NonNegativeFloat = 0.5
    """Of the teacher's probabilities."""
    hard_weight: NonNegativeFloat | None = None
    """Of the ground truth; by default 1 - soft_weight as in the authors' code, the paper prints 1
    for both."""
    heads: tuple[PositiveInt, PositiveInt] | None = None
    """Of the projectors of the last but one and the last map; by default one for 128 channels."""
    softmax_scale: PositiveFloat = 5.0
    """5 for Swin teachers, 1 in the authors' settings for others."""
    stem_norm: Literal["auto", "batch", "layer"] = "auto"
    """auto takes layer norm for ConvNeXt and Swin students, else batch norm."""
    tail_blocks: PositiveInt = 2
    """Of a plain transformer; a Swin's tail is its last stage."""

    @field_validator("tpp")
    @classmethod
    def _queries_are_taken(cls, tpp: bool, info: ValidationInfo) -> bool:
        projector = info.data.get("projector", "cap")
        if tpp and projector != "cap":
            raise UsageError(
                f"the proxy path gives queries, and projector {projector} takes none: set tpp = "
                "false, or projector = cap"
            )
        return tpp

    @field_validator("hard_weight")
    @classmethod
    def _rest_of_one(cls, hard_weight: float | None, info: ValidationInfo) -> float | None:
        soft_weight = info.data.get("soft_weight", 0.0)
        if hard_weight is None and soft_weight > 1:
            raise UsageError(
                f"by default 1 - soft_weight, and soft_weight is {soft_weight}: give hard_weight, "
                "or a soft_weight within 0 and 1"
            )
        return hard_weight

    @property
    def paths(self) -> dict[str, float]:
        """Weight by name: the map as it is, and without its mean."""
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


def spatial(made_BCHW: torch.Tensor, wanted_BCHW: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """float32 (B,): squared distance of the channel vectors at unit length, mean over places.

    0 where they point the same way, 2 at right angles, 4 where they are opposite.
    """
    made = nn.functional.normalize(made_BCHW.float(), dim=1, eps=eps)
    wanted = nn.functional.normalize(wanted_BCHW.float(), dim=1, eps=eps)
    return (made - wanted).square().sum(dim=1).mean(dim=(1, 2))


def frequency(made_BCHW: torch.Tensor, wanted_BCHW: torch.Tensor) -> torch.Tensor:
    """float32 (B,): `spatial` of the maps without the zero frequency of their cosine transform.

    That is, less each channel's mean over the map.
    """
    return spatial(without_mean(made_BCHW), without_mean(wanted_BCHW), eps=1e-6)


def without_mean(map_BCHW: torch.Tensor) -> torch.Tensor:
    """float32, each channel less its mean over the map."""
    map_BCHW = map_BCHW.float()
    return map_BCHW - map_BCHW.mean(dim=(2, 3), keepdim=True)


DISTANCES = {"spatial": spatial, "frequency": frequency}


class ScaleKd(Method):
    """Projectors of each path. tail: the teacher's, held outside the modules."""

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
        wanted = targets.teacher.final.detach()
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
                terms[f"proxy_{name}"] = weight * distance(proxy, wanted)
                query = proxy if s.adaptive_queries else None
            made = self.last[name](student.final, query)
            terms[name] = weight * distance(made, wanted)
        return terms


def build(settings: Settings, context: Context) -> ScaleKd:
    """Raises ModelError: a teacher without a tail for the proxy path."""
    teacher = parts.teacher_side(context.teacher, "scalekd")
    assert teacher.final is not None
    tail = None
    if settings.tpp:
        if context.teacher_network is None:
            raise ModelError("scalekd with tpp runs the teacher's last stage: --teacher NAME=FILE.")
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
