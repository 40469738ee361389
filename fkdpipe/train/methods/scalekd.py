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

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks import tails
from fkdpipe.networks.feature_layers import Needs, Outputs
from fkdpipe.networks.tails import Tail
from fkdpipe.train import losses
from fkdpipe.train.methods import parts
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets
from fkdpipe.train.methods.projectors import Attention, Cap, Plain

LAYER_NORMED = ("ConvNeXt", "SwinTransformer", "SwinTransformerV2")  # students, by class


@dataclass(frozen=True)
class Settings:
    """Switches and weights.

    target: where the teacher's map comes from: a teacher beside the student, or the store
        (`generate --features map`); of a teacher given too only the tail runs then.
    projector: cap, or linear or conv to compare. dfm: the second path. tpp: the proxy path.
    adaptive_queries: the proxy path gives the queries; False learns fixed ones.
    spatial_weight, frequency_weight: of the two paths, on means over the map's places. The code's
        0.08 and 0.06 are on sums over 49 places, its 0.02 and 0.015 over 196.
    kd_weight: of the teacher's probabilities. hard_weight: of the ground truth; None takes
        1 - kd_weight as the authors' code, the paper prints 1 for both.
    heads: of the projectors of the last but one and the last map; None takes one for 128 channels.
    softmax_scale: 5 for Swin teachers, 1 in the authors' settings for others.
    stem_norm: auto takes layer norm for ConvNeXt and Swin students, else batch norm.
    tail_blocks: of a plain transformer; a Swin's tail is its last stage.
    """

    target: Literal["live", "stored"] = "live"
    projector: Literal["cap", "linear", "conv"] = "cap"
    dfm: bool = True
    tpp: bool = True
    adaptive_queries: bool = True
    spatial_weight: float = 3.92
    frequency_weight: float = 2.94
    kd_weight: float = 0.5
    hard_weight: float | None = None
    heads: tuple[int, int] | None = None
    softmax_scale: float = 5.0
    stem_norm: Literal["auto", "batch", "layer"] = "auto"
    tail_blocks: int = 2

    def __post_init__(self) -> None:
        parts.check_weights(self, "spatial_weight", "frequency_weight", "kd_weight")
        if self.hard_weight is not None:
            parts.check_weights(self, "hard_weight")
        parts.check_positive(self, "softmax_scale", "tail_blocks")
        if self.hard_weight is None and not 0 <= self.kd_weight <= 1:
            raise UsageError(
                f"kd_weight must be within 0 and 1, or hard_weight be given; found "
                f"{self.kd_weight}."
            )
        if self.heads is not None and min(self.heads) < 1:
            raise UsageError(f"heads must be at least 1; found {list(self.heads)}.")
        if self.tpp and self.projector != "cap":
            raise UsageError(
                f"the proxy path gives queries, and projector {self.projector} takes none: set "
                "tpp = false, or projector = cap."
            )

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
        soft=1.0 if settings.kd_weight else None,
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
        terms = {"hard": (1 - s.kd_weight if s.hard_weight is None else s.hard_weight) * hard}
        if s.kd_weight:
            soft = losses.soft_cross_entropy(student.logits, targets.soft(1.0))
            terms["kd"] = s.kd_weight * soft
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
