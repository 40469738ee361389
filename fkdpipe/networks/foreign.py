"""Networks that are in no library here: a module handed over in Python, or a function named on the
command line that returns one.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

import torch
from torch import nn

from fkdpipe.common.errors import ModelError, UsageError


def call(name: str, **arguments: Any) -> Any:
    """What a function returns; modules of the current folder are found, as by `python -m`.

    This runs other people's code, so `name` must come from the user in person
    (`fkdpipe.networks.models.parse_spec` sees to it).

    Args:
        name: PACKAGE.MODULE:FUNCTION.
        arguments: passed on; `num_classes` only to a function that takes it.

    Raises:
        UsageError: not of that form.
        ModelError: no such module or function. What the function itself raises passes through.
    """
    package, colon, attribute = name.partition(":")
    if not (package and colon and attribute):
        raise UsageError(f"python:{name}: write python:PACKAGE.MODULE:FUNCTION.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(package), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{package}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise ModelError(
            f"python:{name}: there is no module {error.name!r}, neither installed nor in the "
            "current folder.",
            code="unknown-model",
        ) from error
    except AttributeError as error:
        raise ModelError(
            f"python:{name}: {package} has no {attribute!r}.", code="unknown-model"
        ) from error
    if "num_classes" in arguments and not _takes(function, "num_classes"):
        del arguments["num_classes"]
    return function(**arguments)


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def data_config(module: nn.Module) -> dict[str, Any]:
    """What a module's `pretrained_cfg` (timm's, or a dict of the same keys) says of its input."""
    config = getattr(module, "pretrained_cfg", None) or {}
    known = {name: config.get(name) for name in ("mean", "std", "interpolation", "crop_pct")}
    if config.get("input_size"):
        known["size"] = tuple(config["input_size"])[-2:]
    return {name: value for name, value in known.items() if value is not None}


def count_outputs(module: nn.Module, size: tuple[int, int], *, name: str) -> int:
    """C, the width of a module's output, from one forward pass; 0 of a timm network without
    classifier, whose output is its features.

    Raises:
        ModelError: it does not run on an image of that size, or gives no (B, C) tensor.
    """
    parameter = next(module.parameters(), torch.empty(0))
    pixels = torch.zeros(1, 3, *size, device=parameter.device)
    was_training = module.training
    try:
        with torch.no_grad():
            scores = module.eval()(pixels)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ModelError(
            f"{name} does not run on pixels of shape {tuple(pixels.shape)}: {error} Give the size "
            "of its input, size=(height, width) in pixels, if that is another.",
            code="no-forward",
        ) from error
    finally:
        module.train(was_training)
    if not torch.is_tensor(scores) or scores.dim() != 2 or len(scores) != 1:
        shape = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
        raise ModelError(
            f"{name} gives {shape} for one image; it must give one tensor of scores before "
            "softmax, of shape (B, C). Wrap it in a module that returns these.",
            code="no-scores",
        )
    is_tower = hasattr(module, "pretrained_cfg") and getattr(module, "num_classes", None) == 0
    return 0 if is_tower else int(scores.shape[1])
