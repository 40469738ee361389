"""Rank and world size from torchrun's environment, or a single process without it.

Generation needs no process group: units are assigned by rank, and processes share only the store.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fkdpipe.common.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rank:
    """This process within a job.

    Attributes:
        index: global rank, 0 to world - 1.
        world: number of processes.
        local: local rank on this machine, which selects the GPU.
    """

    index: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        return self.index == 0


def current() -> Rank:
    """The rank set by torchrun, or that of a single process."""
    env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Rank()
    return Rank(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))


def choose_device(device: torch.device | str | None, local_rank: int = 0) -> torch.device:
    """Choose a torch device. "auto" and None select the local rank's GPU, or the CPU without GPUs.

    Raises:
        UsageError: invalid or unavailable device.
    """
    import torch

    if device in (None, "auto"):
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} must be auto, cpu, cuda or cuda:N.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} must be auto, cpu, cuda or cuda:N.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device} is not available: torch has {torch.cuda.device_count()} CUDA devices."
        )
    return chosen


def default_threads() -> int:
    """CPU cores available to this process, divided by the number of processes on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // processes)


def parse_part(text: str) -> Rank:
    """Parse `I/N` of `--part`, counted from 1, as a rank.

    Raises:
        UsageError: invalid text.
    """
    first, slash, second = text.partition("/")
    if slash and first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second):
        return Rank(int(first) - 1, int(second), 0)
    raise UsageError(f"--part takes I/N with 1 <= I <= N, for example 2/8; found {text!r}.")
