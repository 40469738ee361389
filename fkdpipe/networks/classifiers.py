"""The classifier of a network or a state dict: its keys and its number of classes."""

from __future__ import annotations

import torch
from torch import nn

from fkdpipe.common.errors import ModelError


def name_of(module: nn.Module) -> str:
    """State-dict prefix of the last linear layer."""
    config = getattr(module, "pretrained_cfg", None)
    name = config.get("classifier") if config else None
    if isinstance(name, (tuple, list)):
        name = name[0]
    if name:
        return str(name)
    linears = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    return linears[-1] if linears else ""


def last_linear(module: nn.Module) -> nn.Module:
    """The assumed classifier of a network that does not name one.

    Raises:
        ModelError: the network has no linear layer.
    """
    name = name_of(module)
    if not name:
        raise ModelError(f"{type(module).__name__} has no linear layer to use as its classifier.")
    return module.get_submodule(name)


def count_classes(module: nn.Module) -> int:
    """C, the width of the classifier; 0 without one."""
    width = getattr(module, "num_classes", None)
    if width is not None:
        return int(width)
    return int(last_linear(module).out_features)  # type: ignore[arg-type]


def classes_in(state: dict[str, torch.Tensor], module: nn.Module, library: str) -> int | None:
    """Number of classes in a state dict; 0 for a timm backbone; None if unknown."""
    name = name_of(module)
    for key in (f"{name}.weight", f"{name}.fc.weight"):
        if key in state:
            return int(state[key].shape[0])
    is_backbone = library == "timm" and not any(key.startswith(f"{name}.") for key in state)
    return 0 if is_backbone else None


def keep_own(state: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, with its classifiers replaced by those of the module."""
    config = getattr(module, "pretrained_cfg", None) or {}
    names = config.get("classifier") or name_of(module)
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    kept = {key: value for key, value in state.items() if not key.startswith(heads)}
    return kept | {k: v for k, v in module.state_dict().items() if k.startswith(heads)}
