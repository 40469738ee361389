"""DPK: the student's map, with part of it given by the teacher, is to become the teacher's map.

How much the teacher gives follows the gap between the two: the mask ratio is 1 - CKA of the
mini-batch. Everything but the student is dropped after training.

Reference:
    Zong et al., "Better Teacher Better Student: Dynamic Prior Knowledge for Knowledge
    Distillation", equations 3 to 7; what the paper leaves open, and reductions, as in the authors'
    code (docs/methods.md lists where the two differ).

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
from fkdpipe.train.methods.dpk_blocks import Fill, Places, Side, Stack, Transform
from fkdpipe.train.methods.dpk_masks import Mask
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds, Targets

Ratio = Literal["cka", "cosine", "fixed", "exponential", "linear"]

DECAY = 0.95  # of the mask ratio an epoch, table 6


@config.settings
class Stage:
    """One pair of maps. An encoder or decoder without blocks is transform mlp or conv."""

    stage: PositiveInt = 1
    """Counted from the end, 1 is the last."""
    grid: PositiveInt | None = None
    """Tokens along a side; by default those of the coarser map."""
    encoder_width: PositiveInt | None = None
    """By default the student's channels, at most 512."""
    encoder_depth: PositiveInt = 6
    """Blocks of the encoder."""
    encoder_heads: PositiveInt = 8
    """Attention heads of the encoder."""
    decoder_width: PositiveInt | None = None
    """By default the teacher's channels, at most 1024."""
    decoder_depth: PositiveInt = 4
    """Blocks of the decoder."""
    decoder_heads: PositiveInt = 8
    """Attention heads of the decoder."""


@config.settings
class Settings:
    """Weights, maps and the ablations of tables 5 to 9."""

    hard_weight: NonNegativeFloat = 0.8
    """Of the ground truth: 0.8 as in the authors' code; 1 as printed."""
    soft_weight: NonNegativeFloat = 0.8
    """Of the teacher's probabilities."""
    feature_weight: NonNegativeFloat = 0.2
    """Of the maps."""
    temperature: PositiveFloat = 1.0
    """Of the teacher's probabilities."""
    stages: tuple[Stage, ...] = (Stage(),)
    """Pairs of maps."""
    ratio: Ratio = "cka"
    """Where the mask ratio comes from: 1 - CKA or 1 - cosine of the mini-batch, fixed_ratio,
    0.95^epoch (exponential) or 1 - epoch / epochs (linear)."""
    fixed_ratio: Probability = 0.75
    """The mask ratio with ratio fixed."""
    mask: Mask = "random"
    """Which tokens are masked."""
    fill: Fill = "teacher"
    """What stands where the mask is."""
    transform: Transform = "encoder-decoder"
    """Kind of encoder and decoder."""
    loss_on: Literal["all", "student"] = "all"
    """All tokens, or only those that are the student's."""
    places: Places = "sincos"
    """Positions of the tokens, fixed as in the authors' code or learnt as in the paper."""

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
                "a grid mask keeps one of every four tokens: take ratio = fixed and "
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
    """A transform for each pair of maps. patches: (student's, teacher's) side, by stage."""

    def __init__(self, settings: Settings, student: Outputs, teacher: Outputs, epochs: int) -> None:
        super().__init__()
        self.settings, self.epochs = settings, epochs
        self.patches: dict[int, tuple[Side, Side]] = {}
        self.transforms = nn.ModuleDict()
        for stage in settings.stages:
            ours, theirs = student.stages[stage.stage], teacher.stages[stage.stage]
            sides = _sides(stage, ours, theirs)
            if settings.ratio == "cosine" and ours.shape != theirs.shape:
                raise ModelError(
                    f"DPK: the cosine of maps {tuple(ours.shape[1:])} and "
                    f"{tuple(theirs.shape[1:])} is not defined; take ratio = cka."
                )
            self.patches[stage.stage] = sides
            tokens = (ours.shape[2] // sides[0].patch) * (ours.shape[3] // sides[0].patch)
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
            ours, theirs = student.stages[stage.stage], targets.teacher.stages[stage.stage]
            term = self._stage_loss(stage.stage, ours, theirs.detach(), targets.epoch)
            terms[f"feature_{stage.stage}"] = s.feature_weight * term
        return terms

    def facts(self) -> dict[str, float]:
        return dict(self._masked)

    def _stage_loss(
        self, stage: int, ours: torch.Tensor, theirs: torch.Tensor, epoch: int
    ) -> torch.Tensor:
        """float32 (B,): squared error of the guessed teacher map, mean over its values."""
        side, teacher_side = self.patches[stage]
        grid = (ours.shape[2] // side.patch, ours.shape[3] // side.patch)
        masked = self.count(ours, theirs, grid, epoch)
        mask_BN = dpk_masks.draw(self.settings.mask, len(ours), grid, masked, ours.device)
        self._masked[f"masked_{stage}"] = masked / (grid[0] * grid[1])
        made = self.transforms[str(stage)](ours, theirs, mask_BN, masked)
        wanted = dpk_blocks.patchify(theirs, teacher_side.patch)
        error_BN = (made.float() - wanted.float()).square().mean(dim=2)
        if self.settings.loss_on == "all":
            return error_BN.mean(dim=1)
        return torch.where(mask_BN, 0.0, error_BN).sum(dim=1) / (mask_BN.shape[1] - masked)

    @torch.no_grad()
    def count(
        self, ours: torch.Tensor, theirs: torch.Tensor, grid: tuple[int, int], epoch: int
    ) -> int:
        """M, how many of N tokens the teacher gives."""
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
        similar = dpk_masks.cka if s.ratio == "cka" else dpk_masks.cosine
        with torch.autocast(ours.device.type, enabled=False):
            return dpk_masks.count(1 - float(similar(ours.flatten(1), theirs.flatten(1))), tokens)


def build(settings: Settings, context: Context) -> Dpk:
    teacher = parts.teacher_side(context.teacher, "dpk")
    return Dpk(settings, context.student, teacher, context.epochs)


def _sides(stage: Stage, ours: torch.Tensor, theirs: torch.Tensor) -> tuple[Side, Side]:
    """Patches that put both maps on one grid of tokens.

    Raises:
        ModelError: there are none of that grid; says which grid would do.
    """
    (h_s, w_s), (h_t, w_t) = parts.grid_of(ours), parts.grid_of(theirs)
    grid = stage.grid or min(h_s, h_t)
    k_s, k_t = h_s // grid, h_t // grid
    fits = k_s and k_t and (k_s * grid, k_t * grid) == (h_s, h_t)
    if not fits or w_s % k_s or w_t % k_t or w_s // k_s != w_t // k_t:
        shared = [n for n in range(1, min(h_s, h_t) + 1) if not (h_s % n or h_t % n)]
        raise ModelError(
            f"DPK: stage {stage.stage} from the end is {h_s} x {w_s} places in the student and "
            f"{h_t} x {w_t} in the teacher, which do not both split into a grid of {grid}. Take "
            f"grid = {shared[-1]}, another stage, or another teacher_size.",
            code="grids-differ",
        )
    if grid * (w_s // k_s) < 4:
        raise ModelError(
            f"DPK: a grid of {grid} x {w_s // k_s} tokens is too small to share out; at least 4 "
            "tokens are needed. Take larger inputs or an earlier stage.",
            code="grid-small",
        )
    return Side(ours.shape[1], k_s), Side(theirs.shape[1], k_t)


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
            student, teacher, tokens, decoder, settings.fill, settings.places
        )
    encoder = Stack(encoder_width, stage.encoder_depth, stage.encoder_heads)
    return dpk_blocks.Attentive(
        student, teacher, tokens, encoder, decoder, settings.fill, settings.places
    )
