"""Fault injection for a forked process: death at a chosen step of a write, and power cuts.

A process under test keeps a journal of its disk operations. From it, `cut_power` removes what a
power cut may lose: data of files and names in folders that were not flushed. Each of these is lost
or kept at random, as on a real disk.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fkdpipe.storage.location import LocalLocation

Event = dict[str, Any]


@dataclass(frozen=True)
class Watch:
    """Instrumentation of a process under test.

    Attributes:
        root: folder to watch.
        journal: file that events are appended to; backups are in journal.old/.
        die_at: step of writing at which the process sends itself SIGKILL, counted from 1; 0 for
            never. Steps are: data half written, written but not flushed, flushed but not renamed,
            renamed but its folder not flushed.
        seed: seed for the positions at which data are torn.
    """

    root: Path
    journal: Path
    die_at: int = 0
    seed: int = 0

    def install(self) -> None:
        """Patch this process; for a forked child only."""
        log = os.open(self.journal, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        self.journal.with_suffix(".old").mkdir(exist_ok=True)
        steps = _Steps(self.die_at, random.Random(self.seed))

        def note(what: str, **facts: Any) -> None:
            os.write(log, json.dumps({"at": time.monotonic_ns(), "what": what, **facts}).encode())
            os.write(log, b"\n")

        os.fsync = self._fsync(os.fsync, note, steps)  # type: ignore[assignment]
        os.replace = self._replace(os.replace, note, steps)  # type: ignore[assignment]
        os.mkdir = self._mkdir(os.mkdir, note)  # type: ignore[assignment]
        plain = LocalLocation.write

        def write(location: LocalLocation, key: str, data: bytes) -> None:
            plain(location, key, data)
            note("written", key=key)

        LocalLocation.write = write  # type: ignore[method-assign]

    def _ours(self, path: str) -> bool:
        return path.startswith(f"{self.root}/")

    def _fsync(self, plain: Callable, note: Callable, steps: _Steps) -> Callable:
        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            if self._ours(path) and not folder:
                steps.torn(descriptor)
                steps.next()
            plain(descriptor)
            note("sync", path=path)
            if self._ours(path) and not folder:
                steps.next()

        return fsync

    def _replace(self, plain: Callable, note: Callable, steps: _Steps) -> Callable:
        def replace(source: str, target: str) -> None:
            old = None
            if os.path.exists(target) and not os.path.samefile(source, target):
                old = str(self.journal.with_suffix(".old") / f"{os.getpid()}-{steps.count}")
                shutil.copy2(target, old)
            note("replace", source=str(source), path=str(target), old=old)
            plain(source, target)
            if self._ours(str(target)):
                steps.next()

        return replace

    def _mkdir(self, plain: Callable, note: Callable) -> Callable:
        def mkdir(path: str, *args: Any, **options: Any) -> None:
            plain(path, *args, **options)
            note("mkdir", path=str(path))

        return mkdir


class _Steps:
    """Count the steps of writing, and die at one of them."""

    def __init__(self, die_at: int, chance: random.Random) -> None:
        self.count, self._die_at, self._chance = 0, die_at, chance

    def next(self) -> None:
        self.count += 1
        if self.count == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(self, descriptor: int) -> None:
        """As `next`, for data that are only partly written."""
        if self.count + 1 == self._die_at:
            os.ftruncate(descriptor, self._chance.randrange(os.fstat(descriptor).st_size + 1))
        self.next()


def events(journals: Sequence[Path]) -> list[Event]:
    """Events of several processes in chronological order."""
    found = []
    for journal in journals:
        lines = journal.read_text().splitlines() if journal.exists() else []
        found += [json.loads(line) for line in lines]
    return sorted(found, key=lambda event: event["at"])


def cut_power(
    root: Path, before: dict[str, int], noted: Sequence[Event], chance: random.Random
) -> int:
    """Remove what was not flushed; return the number of affected names and files.

    Args:
        before: path to inode of every file at the start of the processes; these are durable.
    """
    hit = 0
    for event, later in _unflushed(noted):
        path = Path(event["path"])
        if chance.random() < 0.5 or not str(path).startswith(f"{root}/") or not path.exists():
            continue
        hit += 1
        if event["what"] == "mkdir":
            shutil.rmtree(path)
        elif event["old"] is None:
            path.unlink()
        elif not any(e["what"] == "replace" and e["path"] == event["path"] for e in later):
            os.replace(event["old"], path)
    flushed = _flushed_files(noted)
    for name, inode in snapshot(root).items():
        if before.get(name) != inode and name not in flushed:
            size = os.path.getsize(name)
            kept = chance.randrange(size + 1)
            with open(name, "r+b") as file:  # truncated, or zeroed
                file.truncate(kept)
                if chance.random() < 0.5:
                    file.truncate(size)
            hit += 1
    return hit


def snapshot(root: Path) -> dict[str, int]:
    """Path to inode of every file below a folder."""
    return {
        os.path.join(folder, name): os.stat(os.path.join(folder, name)).st_ino
        for folder, _, names in os.walk(root)
        for name in names
    }


def _unflushed(noted: Sequence[Event]) -> list[tuple[Event, Sequence[Event]]]:
    """New names whose folder was not flushed afterwards, newest first, with all later events."""
    found = []
    for index, event in enumerate(noted):
        later = noted[index + 1 :]
        folder = os.path.dirname(event.get("path", ""))
        if event["what"] in ("mkdir", "replace") and not any(
            e["what"] == "sync" and e["path"] == folder for e in later
        ):
            found.append((event, later))
    return found[::-1]


def _flushed_files(noted: Sequence[Event]) -> set[str]:
    flushed: set[str] = set()
    for event in noted:
        if event["what"] == "sync":
            flushed.add(event["path"])
        elif event["what"] == "replace":
            (flushed.add if event["source"] in flushed else flushed.discard)(event["path"])
    return flushed
