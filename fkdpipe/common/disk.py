"""Errors of a file, and errors of the disk or the system under it, which may pass.

What is wrong with a file is recorded of it for good; an error that may pass never is. A write that
fails names its file and says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from fkdpipe.common.errors import FkdpipeError

T = TypeVar("T")

RETRY_SECONDS = 1.0

_OF_A_FILE = frozenset(
    {
        errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
        errno.ENAMETOOLONG, errno.ENXIO,
    }
)  # fmt: skip


def may_pass(error: OSError) -> bool:
    """Whether the disk or the system failed (EIO, ESTALE, EMFILE, ...) and not the file.

    Errors without a number come from decoders and are the file's.
    """
    return error.errno is not None and error.errno not in _OF_A_FILE


def read_twice(read: Callable[[], T]) -> T:
    """The result of `read`, which is called again after a second where the failure may pass.

    Raises:
        OSError: of the file, or of the disk twice.
    """
    try:
        return read()
    except OSError as error:
        if not may_pass(error):
            raise
    time.sleep(RETRY_SECONDS)
    return read()


def words(error: OSError, place: str) -> str:
    """Why the disk refused, and what to do; `place` is what would have to be writable."""
    return {
        errno.ENOSPC: "the disk is full. Free some space",
        errno.EDQUOT: "the disk quota is used up. Free some space",
        errno.EACCES: f"permission denied. Make {place} writable",
        errno.EPERM: f"permission denied. Make {place} writable",
        errno.EROFS: f"the file system is read-only. Make {place} writable",
    }.get(error.errno or 0, f"{error.strerror or error}. Mend that")


@contextlib.contextmanager
def writing(file: str | os.PathLike[str]) -> Iterator[None]:
    """A failed write as an OSError that names `file`, also where torch (which hides the error of a
    Python file behind a RuntimeError) or safetensors (which only prints it) raise another."""
    try:
        yield
    except Exception as error:
        number = None if isinstance(error, FkdpipeError) else _disk_errno(error)
        if number is None or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise OSError(number, os.strerror(number), os.fspath(file)) from error


def _disk_errno(error: BaseException) -> int | None:
    hidden: BaseException | None = error
    while hidden is not None:
        if isinstance(hidden, OSError):
            return hidden.errno
        hidden = hidden.__context__
    printed = re.search(r"\(os error (\d+)\)", str(error))
    return int(printed[1]) if printed else None
