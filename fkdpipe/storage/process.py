"""Identify this process among those on all machines that may write a store."""

from __future__ import annotations

import functools
import os
import socket
import zlib
from pathlib import Path
from typing import Any


def facts() -> dict[str, Any]:
    """What distinguishes this process from any other, on any machine."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "space": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        "pid": pid,
        "started": started(pid),
    }


@functools.cache
def machine() -> str:
    """Eight hex digits for this machine (or container), within which a process id is unique."""
    ours = facts()
    return f"{zlib.crc32(repr([ours[k] for k in ('host', 'boot', 'space')]).encode()):08x}"


def started(pid: int) -> str | None:
    """When a process on this machine was started, in clock ticks; None if it does not exist."""
    status = _text(f"/proc/{pid}/stat")
    if status:
        return status.rpartition(")")[2].split()[19]
    try:
        os.kill(pid, 0)  # without /proc, only its existence can be checked
    except (OSError, OverflowError):
        return None
    return "there"


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
