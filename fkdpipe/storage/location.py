"""Where the bytes of a store live: a folder, or a prefix of an object store.

Six verbs are all the store needs. A write is complete or absent: on disk a temporary file, fsync,
rename, fsync of the folders; on an object store a put is atomic as it is.
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

# Ends the names of files that are being written: `<name>.<machine>-<process>.partial`.
PARTIAL = ".partial"


class Location(Protocol):
    """Bytes by key; keys use "/" and never start with it."""

    url: str

    def read(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError when there is none, StoreError when it is
        there and cannot be read."""

    def write(self, key: str, data: bytes) -> None:
        """Replace or create, durably and atomically."""

    def create(self, key: str, data: bytes) -> bool:
        """Create; False, and nothing changed, when the key exists."""

    def length(self, key: str) -> int | None:
        """Bytes of an object, None when there is none."""

    def age_seconds(self, key: str) -> float | None:
        """Seconds since an object was written, None when there is none."""

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) of every object below a prefix, in no particular order."""

    def delete(self, key: str) -> None:
        """Remove if present."""


def open_location(place: str | os.PathLike[str]) -> Location:
    """A folder path, or a URL (`s3://`, `gs://`, `az://`, `memory://`)."""
    text = os.fspath(place)
    if "://" in text and not text.startswith("file://"):
        from fkdpipe.storage.remote import RemoteLocation

        return RemoteLocation(text)
    return LocalLocation(Path(text.removeprefix("file://")))


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
                with contextlib.suppress(FileNotFoundError):  # renamed or swept meanwhile
                    yield path.relative_to(self.root).as_posix(), path.stat().st_size

    def delete(self, key: str) -> None:
        try:
            (self.root / key).unlink(missing_ok=True)
        except OSError as error:
            raise _explained(error, self.root / key) from error

    def _publish(self, key: str, data: bytes, *, new: bool) -> bool:
        """Write a temporary file, flush it, and give it its name; False when that is to be new and
        is taken."""
        path = self.root / key
        partial = path.with_name(f"{path.name}.{process.machine()}-{os.getpid()}{PARTIAL}")
        try:
            made = _make_folders(path.parent)
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if new and not _take_name(partial, path):
                partial.unlink()
                return False
            os.replace(partial, path)
            partial.unlink(missing_ok=True)  # there still when the two were one file by hard link
            self._sync_folders(path, made)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise _explained(error, path) from error
        return True

    def _sync_folders(self, path: Path, made: Sequence[Path]) -> None:
        """Make a name durable: with all folders above, since another process may have made one of
        them and been stopped before it was flushed."""
        for folder in path.parents:
            _sync_folder(folder)
            if folder == self.root:
                break
        for folder in made:
            _sync_folder(folder)


def _take_name(partial: Path, path: Path) -> bool:
    """Is this name ours from now on? The file has it in one step where there are hard links; else
    the name is taken by an empty file, until the replacement that follows."""
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
    """Create a folder and those above; returns the parents whose entries changed."""
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
