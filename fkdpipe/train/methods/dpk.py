"""DPK: predict the teacher's map from the student's, with some tokens taken from the teacher.

The share of teacher tokens follows the gap between the two: the mask ratio is 1 - CKA of the
mini-batch. Everything but the student is discarded after training.

Reference:
    Zong et al., "Better Teacher Better Student: Dynamic Prior Knowledge for Knowledge
    Distillation", equations 3 to 7; what the paper leaves open, and reductions, follow the
    authors' code (docs/methods.md lists the differences).

Letters: B batch, C channels, H, W map, N tokens, M masked tokens, k side of a patch.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, ValidationInfo, field_validator
from torch import nn

from fkdpipe.common import config
from fkdpipe.common.config import Probability
from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks.feature_layers import Needs, Outputs
from fkdpipe.train.methods import dpk_blocks, dpk_masks, parts
from fkdpipe.train.methods.dpk_blocks import Fill, Positions, Side, Stack, Transform
from fkdpipe.train.methods.dpk_masks import Mask
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets

Ratio = Literal["cka", "cosine", "fixed", "exponential", "linear"]

DECAY = 0.95  # of the mask ratio per epoch, table 6


@config.settings
class Stage:
    """A pair of maps and the sizes of its transform."""

    stage: PositiveInt = 1
    """Stage of both networks, counted from the end; 1 is the last."""
    grid: PositiveInt | None = None
    """Tokens along a side; default: the side of the coarser map."""
    encoder_width: PositiveInt | None = None
    """Width of the encoder; default: the student's channels, at most 512."""
    encoder_depth: PositiveInt = 6
    """Number of blocks of the encoder."""
    encoder_heads: PositiveInt = 8
    """Number of attention heads of the encoder."""
    decoder_width: PositiveInt | None = None
    """Width of the decoder; default: the teacher's channels, at most 1024."""
    decoder_depth: PositiveInt = 4
    """Number of blocks of the decoder."""
    decoder_heads: PositiveInt = 8
    """Number of attention heads of the decoder."""


@config.settings
class Settings:
    """Loss weights, maps, and the ablations of tables 5 to 9."""

    hard_weight: NonNegativeFloat = 0.8
    """Weight of the cross-entropy with the ground truth; 0.8 in the authors' code, 1 in the
    paper."""
    soft_weight: NonNegativeFloat = 0.8
    """Weight of the KL divergence from the teacher's probabilities."""
    feature_weight: NonNegativeFloat = 0.2
    """Weight of the feature loss."""
    temperature: PositiveFloat = 1.0
    """Temperature of student and teacher probabilities."""
    stages: tuple[Stage, ...] = (Stage(),)
    """Pairs of maps to match."""
    ratio: Ratio = "cka"
    """Mask ratio: 1 - CKA or 1 - cosine of the mini-batch, fixed_ratio, 0.95^epoch (exponential)
    or 1 - epoch / epochs (linear)."""
    fixed_ratio: Probability = 0.75
    """Mask ratio of ratio = fixed."""
    mask: Mask = "random"
    """Pattern of the masked tokens."""
    fill: Fill = "teacher"
    """Content of the masked tokens."""
    transform: Transform = "encoder-decoder"
    """Architecture of encoder and decoder."""
    loss_on: Literal["all", "student"] = "all"
    """Tokens of the feature loss: all, or only the student's."""
    positions: Positions = "sincos"
    """Position embeddings: sincos as in the authors' code, or learnable as in the paper."""

    @field_validator("stages")
    @classmethod
    def _each_once(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        parts.check_stages(tuple(stage.stage for stage in stages))
        return stages

    @field_validator("mask")
    @classmethod
    def _ratio_of_a_grid(cls, mask: str, info: ValidationInfo) -> str:
        ratio = (info.data.get("ratio"), info.data.get("fixed_ratio"))
        if mask == "grid" and None not in ratio and ratio != ("fixed", dpk_masks.GRID_RATIO):
            raise UsageError(
                "a grid mask keeps one of every four tokens: set ratio = fixed and "
                f"fixed_ratio = {dpk_masks.GRID_RATIO}, or mask = random"
            )
        return mask


def needs(settings: Settings) -> MethodNeeds:
    needs = Needs(stages=tuple(stage.stage for stage in settings.stages))
    return MethodNeeds(
        student=needs,
        teacher=needs,
        soft=settings.temperature if settings.soft_weight else None,
        live=True,
        classifier=bool(settings.hard_weight or settings.soft_weight),
        independent=settings.ratio == "cka",
        least=4 if settings.ratio == "cka" else 1,  # CKA is not defined on fewer
    )


class Dpk(Method):
    """DPK's loss, with a transform for each pair of maps.

    Attributes:
        patches: (student, teacher) map and patch sizes, by stage.
    """

    def __init__(self, settings: Settings, student: Outputs, teacher: Outputs, epochs: int) -> None:
        super().__init__()
        self.settings, self.epochs = settings, epochs
        self.patches: dict[int, tuple[Side, Side]] = {}
        self.transforms = nn.ModuleDict()
        for stage in settings.stages:
            student_map, teacher_map = student.stages[stage.stage], teacher.stages[stage.stage]
            sides = _sides(stage, student_map, teacher_map)
            if settings.ratio == "cosine" and student_map.shape != teacher_map.shape:
                raise ModelError(
                    f"DPK: the cosine of maps {tuple(student_map.shape[1:])} and "
                    f"{tuple(teacher_map.shape[1:])} is not defined; set ratio = cka."
                )
            self.patches[stage.stage] = sides
            tokens = (student_map.shape[2] // sides[0].patch) * (
                student_map.shape[3] // sides[0].patch
            )
            self.transforms[str(stage.stage)] = _transform(settings, stage, *sides, tokens)
        self._masked: dict[str, float] = {}

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
            student_map, teacher_map = (
                student.stages[stage.stage],
                targets.teacher.stages[stage.stage],
            )
            term = self._stage_loss(stage.stage, student_map, teacher_map.detach(), targets.epoch)
            terms[f"feature_{stage.stage}"] = s.feature_weight * term
        return terms

    def facts(self) -> dict[str, float]:
        return dict(self._masked)

    def _stage_loss(
        self, stage: int, student_map: torch.Tensor, teacher_map: torch.Tensor, epoch: int
    ) -> torch.Tensor:
        """float32 (B,): mean squared error of the predicted teacher map."""
        side, teacher_side = self.patches[stage]
        grid = (student_map.shape[2] // side.patch, student_map.shape[3] // side.patch)
        masked = self.count(student_map, teacher_map, grid, epoch)
        mask_BN = dpk_masks.draw(
            self.settings.mask, len(student_map), grid, masked, student_map.device
        )
        self._masked[f"masked_{stage}"] = masked / (grid[0] * grid[1])
        prediction = self.transforms[str(stage)](student_map, teacher_map, mask_BN, masked)
        target = dpk_blocks.patchify(teacher_map, teacher_side.patch)
        error_BN = (prediction.float() - target.float()).square().mean(dim=2)
        if self.settings.loss_on == "all":
            return error_BN.mean(dim=1)
        return torch.where(mask_BN, 0.0, error_BN).sum(dim=1) / (mask_BN.shape[1] - masked)

    @torch.no_grad()
    def count(
        self,
        student_map: torch.Tensor,
        teacher_map: torch.Tensor,
        grid: tuple[int, int],
        epoch: int,
    ) -> int:
        """M, the number of tokens taken from the teacher."""
        s = self.settings
        tokens = grid[0] * grid[1]
        if s.mask == "grid":
            return dpk_masks.grid_count(grid)
        if s.ratio == "fixed":
            return dpk_masks.count(s.fixed_ratio, tokens)
        if s.ratio == "exponential":
            return dpk_masks.count(DECAY**epoch, tokens)
        if s.ratio == "linear":
            return dpk_masks.count(1 - epoch / self.epochs, tokens)
        similarity = dpk_masks.cka if s.ratio == "cka" else dpk_masks.cosine
        with torch.autocast(student_map.device.type, enabled=False):
            return dpk_masks.count(
                1 - float(similarity(student_map.flatten(1), teacher_map.flatten(1))), tokens
            )


def build(settings: Settings, context: Context) -> Dpk:
    teacher = parts.teacher_side(context.teacher, "dpk")
    return Dpk(settings, context.student, teacher, context.epochs)


def _sides(stage: Stage, student_map: torch.Tensor, teacher_map: torch.Tensor) -> tuple[Side, Side]:
    """Patch sizes that divide both maps into the same grid of tokens.

    Raises:
        ModelError: there are none for that grid; suggests one that works.
    """
    (h_s, w_s), (h_t, w_t) = parts.grid_of(student_map), parts.grid_of(teacher_map)
    grid = stage.grid or min(h_s, h_t)
    k_s, k_t = h_s // grid, h_t // grid
    fits = k_s and k_t and (k_s * grid, k_t * grid) == (h_s, h_t)
    if not fits or w_s % k_s or w_t % k_t or w_s // k_s != w_t // k_t:
        shared = [n for n in range(1, min(h_s, h_t) + 1) if not (h_s % n or h_t % n)]
        raise ModelError(
            f"DPK: stage {stage.stage} from the end has {h_s} x {w_s} positions in the student and "
            f"{h_t} x {w_t} in the teacher, which do not both divide into a grid of {grid}. Use "
            f"grid = {shared[-1]}, another stage, or another teacher_size.",
            code="grids-differ",
        )
    if grid * (w_s // k_s) < 4:
        raise ModelError(
            f"DPK: a grid of {grid} x {w_s // k_s} tokens is too small; at least 4 tokens are "
            "needed. Use larger inputs or an earlier stage.",
            code="grid-small",
        )
    return Side(student_map.shape[1], k_s), Side(teacher_map.shape[1], k_t)


def _transform(
    settings: Settings, stage: Stage, student: Side, teacher: Side, tokens: int
) -> nn.Module:
    encoder_width = stage.encoder_width or min(student.channels, 512)
    decoder_width = stage.decoder_width or min(teacher.channels, 1024)
    if settings.transform == "conv":
        return dpk_blocks.Convolutional(student, teacher, encoder_width, settings.fill)
    decoder = Stack(decoder_width, stage.decoder_depth, stage.decoder_heads)
    if settings.transform == "mlp":
        return dpk_blocks.Pointwise(
            student, teacher, tokens, decoder, settings.fill, settings.positions
        )
    encoder = Stack(encoder_width, stage.encoder_depth, stage.encoder_heads)
    return dpk_blocks.Attentive(
        student, teacher, tokens, encoder, decoder, settings.fill, settings.positions
    )
