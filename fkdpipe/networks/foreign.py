"""User-defined networks: a module passed in Python, or a function named on the command line."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from typing import Any

import torch
from torch import nn

from fkdpipe.common.errors import ModelError, UsageError


def call(name: str, **arguments: Any) -> Any:
    """Import and call a function; the current folder is on the path, as with `python -m`.

    This runs arbitrary code, so `name` must come from the user directly
    (`fkdpipe.networks.models.parse_spec` ensures it).

    Args:
        name: PACKAGE.MODULE:FUNCTION.
        arguments: keyword arguments; `num_classes` is dropped if the function does not take it.

    Raises:
        UsageError: invalid form.
        ModelError: no such module or function, or its code raises an exception.
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
            raise _raised(name, error) from error  # a missing import of the module itself
        raise ModelError(
            f"python:{name}: no module {error.name!r} is installed or in the current folder.",
            code="unknown-model",
        ) from error
    except AttributeError as error:
        raise ModelError(
            f"python:{name}: {package} has no {attribute!r}.", code="unknown-model"
        ) from error
    except Exception as error:
        raise _raised(name, error) from error
    if not callable(function):
        raise ModelError(f"python:{name} is {type(function).__name__}, not a function.")
    if "num_classes" in arguments and not _takes(function, "num_classes"):
        del arguments["num_classes"]
    try:
        return function(**arguments)
    except Exception as error:
        raise _raised(name, error) from error


def _raised(name: str, error: Exception) -> ModelError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return ModelError(
        f"python:{name} raised {type(error).__name__}: {error}{where}.", code="function-raised"
    )


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def data_config(module: nn.Module) -> dict[str, Any]:
    """Preprocessing from a module's `pretrained_cfg` (timm's, or a dict with the same keys)."""
    config = getattr(module, "pretrained_cfg", None) or {}
    known = {name: config.get(name) for name in ("mean", "std", "interpolation", "crop_pct")}
    if config.get("input_size"):
        known["size"] = tuple(config["input_size"])[-2:]
    return {name: value for name, value in known.items() if value is not None}


def count_outputs(module: nn.Module, size: tuple[int, int], *, name: str) -> int:
    """C, the width of a module's output, from one forward pass; 0 for a timm network without
    classifier, which outputs features.

    Raises:
        ModelError: it does not run on an image of that size, or does not return a (B, C) tensor.
    """
    parameter = next(module.parameters(), torch.empty(0))
    pixels = torch.zeros(1, 3, *size, device=parameter.device)
    was_training = module.training
    try:
        with torch.no_grad():
            scores = module.eval()(pixels)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ModelError(
            f"{name} does not run on pixels of shape {tuple(pixels.shape)}: {error} If its input "
            "has another size, pass size=(height, width) in pixels.",
            code="no-forward",
        ) from error
    finally:
        module.train(was_training)
    if not torch.is_tensor(scores) or scores.dim() != 2 or len(scores) != 1:
        shape = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
        raise ModelError(
            f"{name} returns {shape} for one image; it must return one tensor of logits, of shape "
            "(B, C). Wrap it in a module that does.",
            code="no-scores",
        )
    is_backbone = hasattr(module, "pretrained_cfg") and getattr(module, "num_classes", None) == 0
    return 0 if is_backbone else int(scores.shape[1])
