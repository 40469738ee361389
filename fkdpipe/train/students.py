"""Students: any timm model, or a network of the user's, from scratch or from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fkdpipe.common.errors import UsageError
from fkdpipe.networks import models
from fkdpipe.networks.models import Loaded, ModelSpec
from fkdpipe.train import methods
from fkdpipe.train.settings import TrainSettings


def build(settings: TrainSettings, spec: ModelSpec, classes: int) -> Loaded:
    """The student of a run, at random weights unless NAME=FILE says otherwise.

    A function that returns one (`python:`) is called with num_classes, where it takes that, and
    with `student_options`.

    Raises:
        UsageError: a torchvision model, or a size the network cannot take.
        ModelError: unknown name, or a checkpoint that does not fit.
    """
    if spec.library not in ("timm", "python"):
        raise UsageError(
            "students are timm models, or python:PACKAGE.MODULE:FUNCTION; torchvision ones can be "
            "teachers."
        )
    size = (settings.size, settings.size) if settings.size else None
    torch.manual_seed(settings.seed)
    return models.build(
        spec,
        classes=classes,
        size=size,
        pretrained=settings.pretrained,
        new_head=settings.new_head,
        options=settings.student_options,
    )


def export_facts(
    settings: TrainSettings, loaded: Loaded, class_names: tuple[str, ...]
) -> dict[str, Any]:
    """What the exported file says of itself; `fkdpipe.networks.models` reads it."""
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
