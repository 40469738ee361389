"""Local paths, and disk errors: permanent ones of a file, transient ones of the disk or the system.

Permanent errors are recorded with the file; transient errors never are. A failed write names its
file and says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from fkdpipe.common.errors import FkdpipeError, UsageError

T = TypeVar("T")

RETRY_SECONDS = 1.0

LFS_POINTER = b"version https://git-lfs"  # first bytes of the file that git keeps in its place

_OF_A_FILE = frozenset(
    {
        errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
        errno.ENAMETOOLONG, errno.ENXIO,
    }
)  # fmt: skip


def local_path(path: str | os.PathLike[str], what: str = "") -> Path:
    """A path on this machine. A URL would otherwise become a local folder such as `s3:`.

    Args:
        path: `Path("s3://a")` has become "s3:/a", which is refused too.
        what: name of the argument, for the message.

    Raises:
        UsageError: it is a URL.
    """
    text = os.fspath(path)
    if url := re.match("([A-Za-z][A-Za-z0-9+.-]+):/+", text):
        name = f"{what}: " if what else ""
        raise UsageError(
            f"{name}{url[1]}://{text[url.end() :]} is a URL, and a local path is needed here. Only "
            "a store can be a URL (in Python, as str); copy other files with the cloud's tools."
        )
    return Path(text)


def refuse_pointer(file: Path, error: type[FkdpipeError]) -> None:
    """Raises `error` if the file is a git-lfs pointer. One that cannot be read is left to its
    reader."""
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise error(
                f"{file} is a git-lfs pointer, which stands for a file that was not downloaded. "
                "Run `git lfs pull` in its repository.",
                code="git-lfs",
            )


def may_pass(error: OSError) -> bool:
    """Whether this is a transient error of the disk or the system (EIO, ESTALE, EMFILE, ...).

    Errors without an errno come from decoders and count as errors of the file.
    """
    return error.errno is not None and error.errno not in _OF_A_FILE


def read_twice(read: Callable[[], T]) -> T:
    """Call `read`, and once more after a second if it fails with a transient error.

    Raises:
        OSError: an error of the file, or a second transient error.
    """
    try:
        return read()
    except OSError as error:
        if not may_pass(error):
            raise
    time.sleep(RETRY_SECONDS)
    return read()


def words(error: OSError, target: str) -> str:
    """The reason of a disk error and what to do; `target` is the path that must be writable."""
    return {
        errno.ENOSPC: "the disk is full. Free some space",
        errno.EDQUOT: "the disk quota is used up. Free some space",
        errno.EACCES: f"permission denied. Make {target} writable",
        errno.EPERM: f"permission denied. Make {target} writable",
        errno.EROFS: f"the file system is read-only. Make {target} writable",
    }.get(error.errno or 0, f"{error.strerror or error}. Fix this")


@contextlib.contextmanager
def writing(file: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failed write into an OSError that names `file`.

    torch hides the OSError behind a RuntimeError, and safetensors only prints its number.
    """
    try:
        yield
    except Exception as error:
        number = None if isinstance(error, FkdpipeError) else _disk_errno(error)
        if number is None or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise OSError(number, os.strerror(number), os.fspath(file)) from error


def _disk_errno(error: BaseException) -> int | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.errno
        cause = cause.__context__
    printed = re.search(r"\(os error (\d+)\)", str(error))
    return int(printed[1]) if printed else None
