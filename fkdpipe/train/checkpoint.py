"""Checkpoints: written atomically, complete enough to resume from, read without pickle."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from fkdpipe.common import disk
from fkdpipe.common.errors import TrainingError

_PATTERN = "step-*.pt"


def save(folder: Path, step: int, content: dict[str, Any], *, keep: int) -> Path:
    """Write `step-<step>.pt` and remove all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{step:09d}.pt"
    write_atomically(file, lambda partial: _save(content, partial))
    for old in list_all(folder)[:-keep]:
        with contextlib.suppress(FileNotFoundError):
            old.unlink()
    return file


def list_all(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob(_PATTERN))


def newest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint; None if there is none."""
    files = list_all(folder)
    return int(files[-1].stem.removeprefix("step-")) if files else None


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint; None if there is none.

    Raises:
        TrainingError: the file cannot be read; the message names the file to delete.
    """
    files = list_all(folder)
    if not files:
        return None
    try:
        return torch.load(files[-1], map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load passes on any exception of its reader
        raise TrainingError(
            f"{files[-1]} cannot be read ({str(error).splitlines()[0]}). Delete it; the run then "
            "resumes from the previous checkpoint.",
            code="checkpoint",
        ) from error


def write_atomically(file: Path, write: Any) -> None:
    """Call `write(partial)` for a temporary file, flush it and rename it to `file`.

    Raises:
        OSError: the write failed; an existing file is unchanged.
    """
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with disk.writing(file):
            write(partial)
            descriptor = os.open(partial, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too
            partial.unlink(missing_ok=True)
        raise


def _save(content: dict[str, Any], partial: Path) -> None:
    with open(partial, "wb") as file:  # a failed write of torch's own gives no reason
        torch.save(content, file)
