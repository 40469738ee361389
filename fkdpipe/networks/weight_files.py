"""Files of weights: read without running anything in them, checked, written for others to load.

No file is ever unpickled: `.safetensors`, or torch's format read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fkdpipe.common.errors import ModelError

EXPORT_NAME = "student.safetensors"  # what a run folder holds for others to load
_METADATA = "fkdpipe"


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """A state dict; wrappers ("state_dict", "model", EMA) and DDP prefixes are taken off.

    Raises:
        ModelError: unreadable, or nothing in it is a state dict.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}.") from error
    except Exception as error:  # whatever torch met; its text advises to run the file
        raise ModelError(
            f"{file} is no checkpoint of plain tensors: it is broken, or holds more than tensors, "
            "and nothing of it is run. Save the state_dict alone, as .safetensors or with "
            "torch.save(model.state_dict(), FILE).",
            code="not-tensors",
        ) from error
    for name in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not any(torch.is_tensor(v) for v in content.values()):
        raise ModelError(f"{file} holds no state dict.")
    state = {k: v for k, v in content.items() if torch.is_tensor(v)}
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_state(module: nn.Module, state: dict[str, torch.Tensor], *, where: str) -> None:
    """Fill a module, refusing any key or shape that does not fit.

    Raises:
        ModelError: with the first keys that are missing, unknown or of another shape.
    """
    own = module.state_dict()
    problems = [
        ("missing", [key for key in own if key not in state]),
        ("unknown", [key for key in state if key not in own]),
        (
            "of another shape",
            [
                f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
                for key in own
                if key in state and state[key].shape != own[key].shape
            ],
        ),
    ]
    lines = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems
        if keys
    ]
    if lines:
        raise ModelError(f"{where}: the checkpoint does not fit: {'; '.join(lines)}.", code="keys")
    module.load_state_dict(state)


def state_digest(module: nn.Module) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_export(file: Path, module: nn.Module, facts: dict[str, Any]) -> None:
    """Weights for others: `timm.create_model(name, checkpoint_path=file)` loads them.

    Args:
        facts: kept as JSON in the header: student, size, mean, std, class names, ...
    """
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    # One entry alone: the writer orders several at random, and equal runs give equal files.
    save_file(state, file, metadata={_METADATA: json.dumps(facts)})


def read_export(file: Path) -> dict[str, Any]:
    """The facts in a safetensors header that fkdpipe wrote; empty for other files."""
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {}).get(_METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}.") from error


# Arguments of timm's `create_model` that name files or addresses: it would read them as it likes,
# and options may come from a recipe or a weight file of others.
_READING_OPTIONS = frozenset(
    {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
)


def check_options(options: Mapping[str, Any], *, where: str) -> None:
    """Raises ModelError when an option of timm's `create_model` names what timm would read."""
    reading = sorted(_READING_OPTIONS & options.keys())
    if reading:
        raise ModelError(
            f"{where}: the option {reading[0]} is not taken, because it names a file that timm "
            "would read. Give weights as NAME=FILE.",
            code="option",
        )


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
