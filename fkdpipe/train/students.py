"""Students: any timm model, or a user's network, from scratch or from a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks import models
from fkdpipe.networks.models import Loaded, ModelSpec
from fkdpipe.train import methods
from fkdpipe.train.settings import TrainSettings


def build(settings: TrainSettings, spec: ModelSpec, classes: int) -> Loaded:
    """Build the student, with random weights unless NAME=FILE gives others.

    A `python:` function is called with `student_options` and, if it takes it, num_classes.

    Raises:
        UsageError: a torchvision model, or an input size that the network does not support.
        ModelError: unknown name, or a checkpoint that does not fit.
    """
    if spec.library not in ("timm", "python"):
        raise UsageError(
            "a student is a timm model or python:PACKAGE.MODULE:FUNCTION; torchvision models can "
            "only be teachers."
        )
    size = (settings.size, settings.size) if settings.size else None
    torch.manual_seed(settings.seed)
    build = functools.partial(
        models.build,
        spec,
        classes=classes,
        size=size,
        pretrained=settings.pretrained,
        options=settings.student_options,
    )
    try:
        return build(new_head=settings.new_head)
    except ModelError as error:
        if error.code != "keys" or settings.new_head or not _fits(build):
            raise
        raise ModelError(
            f"{error} Its classifier is for other classes than the {classes} of this run; the "
            "rest fits. Use --new-head to start with a new classifier.",
            code="other-classes",
        ) from error


def _fits(build: Callable[..., Loaded]) -> bool:
    """Whether the weights fit without their classifier."""
    try:
        build(new_head=True)
    except ModelError:
        return False
    return True


def export_facts(
    settings: TrainSettings, loaded: Loaded, class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Metadata of the exported file, read by `fkdpipe.networks.models`."""
    p = loaded.preprocessing
    return {
        "student": str(replace(loaded.spec, weights=None)),
        "num_classes": loaded.classes,
        "options": settings.student_options,
        "size": list(p.size),
        "interpolation": settings.interpolation or p.interpolation,
        "mean": list(p.mean),
        "std": list(p.std),
        "crop_pct": p.crop_pct,
        "class_names": list(class_names),
        "classifier": methods.needs(settings.method).classifier,
    }
