"""One process at a time writes a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fkdpipe.common.errors import TrainingError

log = logging.getLogger(__name__)

LOCK = "run.lock"


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Lock a run folder. The system unlocks it when its process ends, killed or not, so that the
    folder can be used again at once.

    Raises:
        TrainingError: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise TrainingError(
                f"{out} is being written by {file.read().strip() or 'another process'}. Wait for "
                "that run to end, or name another --out folder.",
                code="running",
            ) from None
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): start no second run there", out, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check(out: Path) -> None:
    """Raises TrainingError if another process holds the run folder."""
    if (out / LOCK).exists():
        with hold(out):
            pass
