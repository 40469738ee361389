"""Optimisers by timm's names."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from fkdpipe.errors import UsageError
from fkdpipe.train.settings import OptimizerSettings


def build(learner: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """One optimiser over the student and the method's helpers.

    Raises:
        UsageError: timm knows no such optimiser.
    """
    name = settings.name.lower()
    if name not in list_optimizers():
        raise UsageError(f"timm has no optimiser {settings.name!r}; it has sgd, adamw, lamb, ...")
    momentum = get_optimizer_info(name).has_momentum
    extra = {"momentum": settings.momentum} if momentum else {}
    return create_optimizer_v2(
        learner,
        opt=name,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        filter_bias_and_bn=False,
        **extra,
    )
