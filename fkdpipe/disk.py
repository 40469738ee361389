"""Errors of a file, and errors of the disk or the system under it, which may pass.

What is wrong with a file is recorded of it for good; an error that may pass never is.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

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
