"""Training metrics: one JSON object per line, and optionally TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from fkdpipe.common.errors import UsageError


class MetricsLog:
    """Append to `metrics.jsonl`; lines after the checkpoint of a resumed run are removed.

    Raises:
        UsageError: TensorBoard is requested but not installed.
    """

    def __init__(self, file: Path, *, resume_step: int, tensorboard: bool = False) -> None:
        kept = [line for line in read(file) if line["step"] <= resume_step] if file.exists() else []
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = file
        self._board = _board(file.parent / "tensorboard", resume_step) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """Write a line with at least `step` (completed steps) and `kind` ("train" or "eval")."""
        with open(self._file, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(f"{line['kind']}/{name}", value, line["step"])
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _board(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "tensorboard = true needs the package: pip install 'fkdpipe[tensorboard]'."
        ) from error
    return SummaryWriter(folder, purge_step=resume_step + 1)


def read(file: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; an incomplete last line is skipped."""
    lines = []
    for text in file.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def last_evaluation(file: Path) -> dict[str, Any] | None:
    """The last evaluation in a metrics file; None if there is none."""
    lines = read(file) if file.is_file() else []
    return next((line for line in reversed(lines) if line["kind"] == "eval"), None)


class Meter:
    """Sums between two lines of metrics; loss and hits stay on the device until read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.loss = torch.zeros((), device=self._device)
        self.last = torch.zeros((), device=self._device)
        self.right = torch.zeros((), dtype=torch.int64, device=self._device)
        self.steps = self.crops = self.images = self.seen = 0

    def add(
        self, loss: torch.Tensor, right: torch.Tensor, *, crops: int, images: int, seen: int
    ) -> None:
        """Add a step.

        Args:
            crops, images: of the whole step. seen: crops of this process.
        """
        self.last = loss
        self.loss = self.loss + loss
        self.right = self.right + right
        self.steps += 1
        self.crops += crops
        self.images += images
        self.seen += seen

    @property
    def sums(self) -> list[float]:
        """Loss, last loss, correct and seen crops of this process. Synchronises with the device."""
        return [float(self.loss), float(self.last), float(self.right), float(self.seen)]

    def line(self, sums: list[float]) -> dict[str, float]:
        """The metrics of a line.

        Args:
            sums: as in `sums`, over all processes.
        """
        loss, last, right, seen = sums
        seconds = time.perf_counter() - self.started
        line = {
            "loss": loss / max(self.steps, 1),
            "last_loss": last,
            "train_top1": 100 * right / max(seen, 1),
            "images_per_s": self.images / seconds,
            "crops_per_s": self.crops / seconds,
            "wait_share": self.waited / seconds,
        }
        if self._device.type == "cuda":
            line["gpu_mb"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        return line
