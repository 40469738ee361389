"""Rank and world from torchrun's environment; works without it.

Generation needs no process group: units are owned by rank, and processes meet in the store.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fkdpipe.common.errors import UsageError


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
