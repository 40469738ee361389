"""Shared by several methods: loss terms on logits, checks, resizing of maps.

Letters: B batch, C channels, H, W map.
"""

from __future__ import annotations

import torch
from torch import nn

from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.train import losses
from fkdpipe.train.methods.interface import Targets


def logit_terms(
    student: Outputs,
    targets: Targets,
    *,
    hard_weight: float,
    soft_weight: float,
    temperature: float,
) -> dict[str, torch.Tensor]:
    """Weighted cross-entropy with the ground truth, and KD's KL divergence times T^2, each (B,)."""
    terms = {}
    if hard_weight:
        hard = losses.soft_cross_entropy(student.logits, targets.truth_BC)
        terms["hard"] = hard_weight * hard
    if soft_weight:
        soft = losses.kl_divergence(student.logits / temperature, targets.soft(temperature))
        terms["kd"] = soft_weight * soft * temperature**2
    return terms


def check_stages(stages: tuple[int, ...]) -> None:
    """Raises UsageError unless there is at least one stage and all differ."""
    if not stages or len(set(stages)) != len(stages):
        raise UsageError(
            f"must list distinct stages, counted from the end (1 is the last); found {list(stages)}"
        )


def on_grid(map_BCHW: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A map resized to a grid (height, width) by adaptive average pooling."""
    if map_BCHW.shape[2:] == grid:
        return map_BCHW
    return nn.functional.adaptive_avg_pool2d(map_BCHW, grid)


def grid_of(map_BCHW: torch.Tensor) -> tuple[int, int]:
    """(H, W)."""
    return int(map_BCHW.shape[2]), int(map_BCHW.shape[3])


def teacher_side(outputs: Outputs | None, method: str) -> Outputs:
    """The teacher's example outputs.

    Raises:
        ModelError: there are none.
    """
    if outputs is None:
        raise ModelError(f"method {method} needs the teacher's maps: --teacher NAME=FILE.")
    return outputs
