"""Stores under a URL, through obstore: `s3://`, `gs://`, `az://`, and `memory://` in one process.

Credentials and endpoints come from the environment variables that each cloud's own tools read. A
put is atomic; the marker of a unit is put last; `create` is a create-only put.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fkdpipe.common.errors import StoreError, UsageError

_memory: dict[str, Any] = {}  # memory:// stores of this process


class RemoteLocation:
    """See `fkdpipe.storage.location.Location`."""

    def __init__(self, url: str) -> None:
        """Raises UsageError if obstore is missing or does not support the URL."""
        try:
            import obstore.store
        except ImportError as error:
            raise UsageError(f"{url} needs obstore: install fkdpipe[remote].") from error
        self.url = url.rstrip("/")
        try:
            if url.startswith("memory://"):
                self._store = _memory.setdefault(self.url, obstore.store.MemoryStore())
            else:
                self._store = obstore.store.from_url(self.url)
        except Exception as error:  # obstore has no common base for a bad URL
            raise UsageError(f"obstore cannot open {url}: {_first(error)}") from error

    def read(self, key: str) -> bytes:
        import obstore

        try:
            return bytes(obstore.get(self._store, key).bytes())
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not _no_bucket(error):
                raise
            raise self._failed("read", key, error) from error

    def write(self, key: str, data: bytes) -> None:
        import obstore

        try:
            obstore.put(self._store, key, data)
        except Exception as error:
            raise self._failed("write", key, error) from error

    def create(self, key: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            obstore.put(self._store, key, data, mode="create")
        except AlreadyExistsError:
            return False
        except Exception as error:
            raise self._failed("write", key, error) from error
        return True

    def length(self, key: str) -> int | None:
        head = self._head(key)
        return None if head is None else int(head["size"])

    def age_seconds(self, key: str) -> float | None:
        head = self._head(key)
        return None if head is None else time.time() - head["last_modified"].timestamp()

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        import obstore

        try:
            for batch in obstore.list(self._store, prefix or None):
                for entry in batch:
                    yield entry["path"], entry["size"]
        except Exception as error:
            raise self._failed("list", prefix, error) from error

    def delete(self, key: str) -> None:
        import obstore

        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._failed("delete", key, error) from error

    def _head(self, key: str) -> Any:
        import obstore

        try:
            return obstore.head(self._store, key)
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._failed("read", key, error) from error

    def _failed(self, what: str, key: str, error: Exception) -> StoreError:
        if _no_bucket(error):
            return StoreError(
                f"{self.url}: the bucket does not exist. Check its name, AWS_ENDPOINT_URL and the "
                "region, or create it.",
                code="no-bucket",
            )
        return StoreError(f"cannot {what} {self.url}/{key}: {_first(error)}", code="cannot-reach")


def _no_bucket(error: Exception) -> bool:
    """Whether the bucket is missing. obstore has no type for it; the codes are of S3 and Azure."""
    return "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error)


def _first(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
