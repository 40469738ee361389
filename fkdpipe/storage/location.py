"""Where the bytes of a store live: a folder, or a prefix in an object store.

A store needs only the methods of `Location`. Writes are atomic: on disk, a temporary file, fsync,
rename, and fsync of the folders; in an object store, a put is atomic by itself.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from fkdpipe.common import disk
from fkdpipe.common.errors import StoreError
from fkdpipe.storage import process

# Suffix of files that are being written: `<name>.<machine>-<process>.partial`.
PARTIAL = ".partial"


class Location(Protocol):
    """Bytes by key; keys use "/" and never start with it."""

    url: str

    def read(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError if it does not exist, StoreError if it
        exists but cannot be read."""

    def write(self, key: str, data: bytes) -> None:
        """Replace or create, durably and atomically."""

    def create(self, key: str, data: bytes) -> bool:
        """Create an object; returns False and changes nothing if the key exists."""

    def length(self, key: str) -> int | None:
        """Length of an object in bytes, None if it does not exist."""

    def age_seconds(self, key: str) -> float | None:
        """Seconds since an object was written, None if it does not exist."""

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) of every object below a prefix, in no particular order."""

    def delete(self, key: str) -> None:
        """Remove if present."""


def open_location(url: str | os.PathLike[str]) -> Location:
    """The location of a folder path, or of a URL (`s3://`, `gs://`, `az://`, `memory://`).

    Raises:
        UsageError: obstore is missing or does not support the URL, or a `Path` was made of a URL.
    """
    text = os.fspath(url)
    if "://" in text and not text.startswith("file://"):
        from fkdpipe.storage.remote import RemoteLocation

        return RemoteLocation(text)
    return LocalLocation(disk.local_path(text.removeprefix("file://")))


class LocalLocation:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def read(self, key: str) -> bytes:
        path = self.root / key
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(path) from None
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read: {error.strerror or error}.", code="cannot-read"
            ) from error

    def write(self, key: str, data: bytes) -> None:
        self._publish(key, data, new=False)

    def create(self, key: str, data: bytes) -> bool:
        return self._publish(key, data, new=True)

    def length(self, key: str) -> int | None:
        try:
            return (self.root / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def age_seconds(self, key: str) -> float | None:
        try:
            return time.time() - (self.root / key).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        top = self.root / prefix
        for folder, _, names in os.walk(top):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # renamed or deleted meanwhile
                    yield path.relative_to(self.root).as_posix(), path.stat().st_size

    def delete(self, key: str) -> None:
        try:
            (self.root / key).unlink(missing_ok=True)
        except OSError as error:
            raise _explained(error, self.root / key) from error

    def _publish(self, key: str, data: bytes, *, new: bool) -> bool:
        """Write a temporary file, flush it and rename it; returns False if `new` and the key
        exists."""
        path = self.root / key
        partial = path.with_name(f"{path.name}.{process.machine()}-{os.getpid()}{PARTIAL}")
        try:
            changed = _make_folders(path.parent)
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if new and not _take_name(partial, path):
                partial.unlink()
                return False
            os.replace(partial, path)
            partial.unlink(missing_ok=True)  # still there if both names were links to one file
            self._sync_folders(path, changed)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise _explained(error, path) from error
        return True

    def _sync_folders(self, path: Path, changed: Sequence[Path]) -> None:
        """Flush the changed folders and all folders above a file: another process may have created
        one of them and been stopped before it was flushed."""
        for folder in path.parents:
            _sync_folder(folder)
            if folder == self.root:
                break
        for folder in changed:
            _sync_folder(folder)


def _take_name(partial: Path, path: Path) -> bool:
    """Claim a file name; False if it exists. A hard link claims it in one step. Without hard links
    an empty file does, until `os.replace` overwrites it."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:
        try:
            path.open("xb").close()
        except FileExistsError:
            return False
    return True


def _make_folders(folder: Path) -> list[Path]:
    """Create a folder and its parents; returns the folders whose entries changed."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    return [path.parent for path in missing]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, path: Path) -> StoreError:
    what = disk.words(error, "the store")
    return StoreError(
        f"{path} cannot be written: {what} and start the same command again; everything committed "
        "so far is kept.",
        code="cannot-write",
    )
