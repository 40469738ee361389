"""Distil image models without a teacher in the training loop.

Phase 1 (`generate`) runs teachers once over recorded crops and fills a store; phase 2 replays
exactly those crops (`LabelledCrops`) in a training loop of your own, or in `fkdpipe train`. The two
meet only on disk, in a store (`open_store`, docs/format.md).

What is named here is the public API (docs/python.md). It is imported on first use, so that
`import fkdpipe` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fkdpipe.common.errors import (
    ClaimedError,
    DamagedStoreError,
    FkdpipeError,
    ImagesError,
    LabelsError,
    ModelError,
    ReplayError,
    StoreError,
    StoreMismatchError,
    TrainingError,
    UnsealedStoreError,
    UsageError,
)

if TYPE_CHECKING:
    from fkdpipe.inspect.opened import Store, open_store
    from fkdpipe.labelgen.api import generate
    from fkdpipe.networks.teachers import load_teacher
    from fkdpipe.storage.labels import Target
    from fkdpipe.train import losses
    from fkdpipe.train.batch import Batch
    from fkdpipe.train.evaluate import Accuracy, evaluate
    from fkdpipe.train.labelled_crops import LabelledCrops

__version__ = "0.1.0"

_ROOMS = {
    "Accuracy": "train.evaluate",
    "Batch": "train.batch",
    "LabelledCrops": "train.labelled_crops",
    "Store": "inspect.opened",
    "Target": "storage.labels",
    "evaluate": "train.evaluate",
    "generate": "labelgen.api",
    "load_teacher": "networks.teachers",
    "losses": "train",
    "open_store": "inspect.opened",
}

__all__ = [
    "Accuracy",
    "Batch",
    "ClaimedError",
    "DamagedStoreError",
    "FkdpipeError",
    "ImagesError",
    "LabelledCrops",
    "LabelsError",
    "ModelError",
    "ReplayError",
    "Store",
    "StoreError",
    "StoreMismatchError",
    "Target",
    "TrainingError",
    "UnsealedStoreError",
    "UsageError",
    "evaluate",
    "generate",
    "load_teacher",
    "losses",
    "open_store",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'fkdpipe' has no attribute {name!r}")
    module = f"fkdpipe.{_ROOMS[name]}"
    if name == "losses":
        return importlib.import_module(f"{module}.losses")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
