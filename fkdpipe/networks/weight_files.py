"""Weight files: safe reading, checks, and export.

No pickled code is ever run: files are `.safetensors`, or torch's format read with
`weights_only=True`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fkdpipe.common import disk
from fkdpipe.common.errors import ModelError

log = logging.getLogger(__name__)

EXPORT_NAME = "student.safetensors"  # the exported student in a run folder
_METADATA = "fkdpipe"

# Entries that hold the state dict, in timm's order, and prefixes of its keys.
_AVERAGES = ("state_dict_ema", "model_ema")
_ENTRIES = (*_AVERAGES, "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read a state dict. What training scripts put around it (timm's arguments and optimiser, the
    prefixes of DDP and torch.compile) is removed.

    Args:
        file: FILE, or FILE#ENTRY for an entry of the checkpoint. By default a moving average if
            there is one, as in timm, then "state_dict" or "model", then the file itself.

    Raises:
        ModelError: unreadable, or no state dict in it; names the entries.
    """
    file, entry = split_entry(file)
    content = _read(file)
    if not entry:
        entry = next((n for n in _ENTRIES if isinstance(content.get(n), dict)), "")
        others = [n for n in _ENTRIES[2:] if isinstance(content.get(n), dict)]
        if entry in _AVERAGES and others:
            log.warning(
                "%s: taking the moving average (%s), as timm does; for the weights themselves, "
                "write %s#%s",
                file, entry, file, others[0],
            )  # fmt: skip
    state = content.get(entry) if entry else content
    if not isinstance(state, dict) or not any(torch.is_tensor(v) for v in state.values()):
        names = [name for name, value in content.items() if isinstance(value, dict)]
        raise ModelError(
            f"{file}{'#' if entry else ''}{entry} does not contain a state dict. The file has the "
            f"entries {', '.join(map(str, [*content][:10])) or 'none'}"
            + (f"; for one of {', '.join(map(str, names))}, write {file}#ENTRY." if names else "."),
            code="no-state",
        )
    state = {key: value for key, value in state.items() if torch.is_tensor(value)}
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def split_entry(file: Path) -> tuple[Path, str]:
    """Split FILE#ENTRY; the entry is "" without one, and where a file has such a name."""
    name, mark, entry = file.name.rpartition("#")
    return (file.with_name(name), entry) if mark and name and not file.is_file() else (file, "")


def _read(file: Path) -> dict[str, Any]:
    """The content of a weight file, read without running code."""
    disk.refuse_pointer(file, ModelError)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # A namespace only holds values, which are checked in turn. timm writes one.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}.") from error
    except Exception as error:  # any error of torch, whose text advises unsafe loading
        raise ModelError(
            f"{file} is not a checkpoint of plain tensors: it is broken, or holds other objects"
            f"{_objects(file)}, which are never loaded. Save only the state_dict, as .safetensors "
            "or with torch.save(model.state_dict(), FILE).",
            code="not-tensors",
        ) from error
    return content if isinstance(content, dict) else {}


def _objects(file: Path) -> str:
    """Names of the objects in a checkpoint, in parentheses; "" if it is broken."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # any error of a broken file
        return ""
    names = [name for name in names if name != "argparse.Namespace"]
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def load_state(module: nn.Module, state: dict[str, torch.Tensor], *, where: str) -> None:
    """Load a state dict; all keys and shapes must match. Counters of batches that BatchNorm keeps,
    which old files lack, may be missing.

    Raises:
        ModelError: keys are missing, unknown or of another shape; names the first ones.
    """
    own = module.state_dict()
    counters = {key: own[key] for key in own if key.endswith("num_batches_tracked")}
    state = counters | state
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
    """SHA-256 (hex) of names, dtypes, shapes and bytes of a module's state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_export(file: Path, module: nn.Module, facts: dict[str, Any]) -> None:
    """Write weights that `timm.create_model(name, checkpoint_path=file)` can load.

    Args:
        facts: metadata, written as JSON to the header: student, size, mean, std, ...
    """
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    # A single entry, because the order of several is random: equal runs give equal files.
    save_file(state, file, metadata={_METADATA: json.dumps(facts)})


def read_export(file: Path) -> dict[str, Any]:
    """The metadata that fkdpipe wrote to a safetensors header; empty for other files."""
    if file.suffix != ".safetensors":
        return {}
    disk.refuse_pointer(file, ModelError)
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
    """Raises ModelError when an option of timm's `create_model` names what timm would read, or asks
    for another number of channels than images have."""
    if options.get("in_chans", 3) != 3:
        raise ModelError(
            f"{where}: in_chans = {options['in_chans']}, and images have 3 channels (grey ones are "
            "converted). Leave it out of student_options.",
            code="option",
        )
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
