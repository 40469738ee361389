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
