"""Rank and world from torchrun's environment; works without it.

Generation needs no process group: units are owned by rank, and processes meet in the store.
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
    """This process among all of a job.

    Attributes:
        index: 0 to world - 1. local: index on this machine, which picks the GPU.
    """

    index: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        return self.index == 0


def current() -> Rank:
    """The rank torchrun gave this process, or the only one."""
    env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Rank()
    return Rank(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))


def choose_device(device: torch.device | str | None, local_rank: int = 0) -> torch.device:
    """A torch device; of "auto" or None a GPU when there is one, and of several the local rank's.

    Raises:
        UsageError: no such device here.
    """
    import torch

    if device in (None, "auto"):
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r}: take auto, cpu, cuda or cuda:N.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r}: take auto, cpu, cuda or cuda:N.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device}: torch sees {torch.cuda.device_count()} CUDA devices here."
        )
    return chosen


def default_threads() -> int:
    """Cores this process may use, shared among the processes of this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // here)


def parse_part(text: str) -> Rank:
    """`I/N` of `--part`, counted from 1, as a rank.

    Raises:
        UsageError: not of that form.
    """
    first, slash, second = text.partition("/")
    if slash and first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second):
        return Rank(int(first) - 1, int(second), 0)
    raise UsageError(f"--part takes I/N with 1 <= I <= N, for example 2/8; found {text!r}.")
