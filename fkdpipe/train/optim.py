"""timm's optimisers for the student and a method's auxiliary modules."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

from fkdpipe.common.errors import UsageError
from fkdpipe.train.learner import Learner
from fkdpipe.train.settings import OptimizerSettings


def build(learner: Learner, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Build the optimiser; a parameter group may scale the learning rate by `lr_scale`.

    Raises:
        UsageError: unknown optimiser, or a setting that it does not have.
    """
    name = settings.name.lower()
    if name not in list_optimizers():
        raise UsageError(f"timm has no optimiser {settings.name!r}; it has sgd, adamw, lamb, ...")
    info = get_optimizer_info(name)
    extra: dict[str, Any] = {"momentum": settings.momentum} if info.has_momentum else {}
    if settings.betas is not None:
        if not info.has_betas:
            raise UsageError(f"optimiser {name} has no betas.")
        extra["betas"] = tuple(settings.betas)
    if settings.eps is not None:
        extra["eps"] = settings.eps
    try:
        return create_optimizer_v2(
            _groups(learner, settings),
            opt=name,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            **extra,
        )
    except TypeError as error:
        raise UsageError(f"optimiser {name}: {error}.") from error


def _groups(learner: Learner, settings: OptimizerSettings) -> list[dict[str, Any]]:
    student, decay = learner.student.network, settings.weight_decay
    groups: list[dict[str, Any]]
    if settings.layer_decay is not None:
        no_decay = _no_weight_decay(student)
        groups = param_groups_layer_decay(
            student,
            decay,
            no_weight_decay_list=() if settings.decay_all else no_decay,
            weight_decay_exclude_1d=not settings.decay_all,
            layer_decay=settings.layer_decay,
        )
        for group in groups:
            group.pop("param_names", None)
    else:
        groups = _by_decay(student, settings)
    auxiliary = _by_decay(learner.method, settings)
    if settings.auxiliary_lr is not None:
        for group in auxiliary:
            group["lr_scale"] = settings.auxiliary_lr / settings.lr
    return groups + auxiliary


def _by_decay(module: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        return []
    if settings.decay_all:
        return [{"params": trainable, "weight_decay": settings.weight_decay}]
    groups = param_groups_weight_decay(
        module, settings.weight_decay, no_weight_decay_list=_no_weight_decay(module)
    )
    return [group for group in groups if group["params"]]


def _no_weight_decay(module: nn.Module) -> set[str]:
    """Parameters that the network excludes from weight decay, such as position embeddings."""
    return set(getattr(module, "no_weight_decay", set)())
