"""Exceptions raised by fkdpipe.

    FkdpipeError                   exit code 1
    ├── UsageError (ValueError)    invalid arguments; exit code 2
    ├── ImagesError                an image folder, or a file in it
    ├── ModelError                 a teacher or a student: name, weights, outputs
    ├── LabelsError                label files of another system, to import or export
    ├── StoreError                 a store that cannot be used for the request
    │   ├── StoreMismatchError     the store has different settings or data
    │   ├── UnsealedStoreError     generation has not finished
    │   ├── DamagedStoreError      bytes differ from what was committed
    │   └── ClaimedError           another process is writing the same part
    ├── ReplayError                a recorded crop that cannot be decoded to pixels
    └── TrainingError              a training run that cannot continue

Messages say what was found, what is allowed and what to do. `code` is a short stable identifier
for scripts and tests; messages may change. `assert` is reserved for internal errors.
"""

from __future__ import annotations


class FkdpipeError(Exception):
    """Base class of all errors; `exit_code` is the exit code of the command line."""

    exit_code = 1

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class UsageError(FkdpipeError, ValueError):
    """Invalid arguments or settings, independent of the data."""

    exit_code = 2


class ImagesError(FkdpipeError):
    """An image folder that cannot be used."""


class ModelError(FkdpipeError):
    """A model name, its weights or its outputs are unknown or do not match."""


class LabelsError(FkdpipeError):
    """Label files that cannot be imported, or a store that cannot be exported to a format."""


class StoreError(FkdpipeError):
    """A store that cannot be used for the request."""


class StoreMismatchError(StoreError):
    """The store was generated with different settings or for different data."""


class UnsealedStoreError(StoreError):
    """The requested part of the store is not finished."""


class DamagedStoreError(StoreError):
    """Bytes of a store differ from those committed; `unit` is the index of the damaged unit."""

    def __init__(self, message: str, *, code: str = "damaged", unit: int | None = None) -> None:
        super().__init__(message, code=code)
        self.unit = unit


class ClaimedError(StoreError):
    """Another running process is writing the same part."""


class ReplayError(FkdpipeError):
    """A recorded crop that cannot be decoded to pixels."""


class TrainingError(FkdpipeError):
    """A training run that cannot continue."""
