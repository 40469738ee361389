"""Everything fkdpipe raises for a user to read.

    FkdpipeError                   exit code 1
    ├── UsageError (ValueError)    arguments that cannot be right; exit code 2
    ├── ImagesError                an image folder, or a file in it
    ├── ModelError                 a teacher or a student: name, weights, outputs
    ├── LabelsError                label files of another system, to import or export
    ├── StoreError                 a store that cannot be used as asked
    │   ├── StoreMismatchError     the store was made with other settings, or for other data
    │   ├── UnsealedStoreError     generation has not finished
    │   ├── DamagedStoreError      bytes differ from what was committed
    │   └── ClaimedError           another process writes the same part
    ├── ReplayError                a recorded crop that cannot become pixels
    └── TrainingError              a run that cannot go on

Messages say what was found, what is allowed and what to do. `code` is a short stable word for
scripts and tests; sentences may change. `assert` is kept for our own mistakes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator


class FkdpipeError(Exception):
    """Root of the tree; `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class UsageError(FkdpipeError, ValueError):
    """Arguments or recipe values that cannot be right, whatever the data are."""

    exit_code = 2


class ImagesError(FkdpipeError):
    """An image folder that cannot be used."""


class ModelError(FkdpipeError):
    """A model name, its weights or its outputs do not fit."""


class LabelsError(FkdpipeError):
    """Label files of another system cannot be imported, or a store not exported to its format."""


class StoreError(FkdpipeError):
    """A store that cannot be used as asked."""


class StoreMismatchError(StoreError):
    """The store was made with other settings, or for other data."""


class UnsealedStoreError(StoreError):
    """The part asked for is not finished."""


class DamagedStoreError(StoreError):
    """Bytes of a store differ from what was committed; `unit` names where."""

    def __init__(self, message: str, *, code: str = "damaged", unit: int | None = None) -> None:
        super().__init__(message, code=code)
        self.unit = unit


class ClaimedError(StoreError):
    """Another live process is writing the same part."""


class ReplayError(FkdpipeError):
    """A recorded crop cannot be turned into pixels."""


class TrainingError(FkdpipeError):
    """A training run cannot go on."""


def disk_words(error: OSError, place: str) -> str:
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
