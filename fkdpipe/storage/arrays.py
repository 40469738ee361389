"""Zarr arrays in memory: where shards are encoded before they are written, and decoded after
their checksum was compared.

Zarr does the encoding, on an in-memory store; the bytes then travel through `location`, which
knows how to make them durable and how to read them from a disk or an object store alike. So data
are checked before they are decoded, and no code path writes part of a shard.
"""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from fkdpipe.storage.schema import Json

_SHARD = re.compile(r"/c/[0-9/]+$")


class Arrays:
    """A Zarr hierarchy of metadata; shards pass through it one region at a time."""

    def __init__(self) -> None:
        self._blobs: dict[str, Any] = {}
        self._store = MemoryStore(store_dict=self._blobs)
        self._opened: dict[str, Any] = {}
        self._lock = threading.Lock()

    def add_group(self, path: str, attributes: Json) -> None:
        zarr.create_group(store=self._store, path=path, attributes=attributes, zarr_format=3)

    def add_array(self, path: str, settings: Json) -> None:
        self._opened[path] = zarr.create_array(store=self._store, name=path, **settings)

    def metadata(self) -> dict[str, bytes]:
        """Key and bytes of every zarr.json."""
        return {key: blob.to_bytes() for key, blob in self._blobs.items() if not _is_shard(key)}

    def load_metadata(self, key: str, data: bytes) -> None:
        self._blobs[key] = cpu.Buffer.from_bytes(data)

    def encode(self, path: str, region: tuple[slice, ...], values: np.ndarray) -> dict[str, bytes]:
        """Shards (key to bytes) of a region that is made of whole shards."""
        array = self._open(path)
        prefix = f"{path}/c"
        with self._lock:
            array[region] = values
            keys = [key for key in self._blobs if key.startswith(prefix)]
            return {key: self._blobs.pop(key).to_bytes() for key in keys}

    def decode(self, path: str, region: tuple[slice, ...], shards: dict[str, bytes]) -> np.ndarray:
        """Values of a region from the shards it is made of; other shards read as fill."""
        array = self._open(path)
        with self._lock:
            for key, data in shards.items():
                self._blobs[key] = cpu.Buffer.from_bytes(data)
            try:
                return np.asarray(array[region])
            finally:
                for key in shards:
                    self._blobs.pop(key, None)

    def _open(self, path: str) -> Any:
        if path not in self._opened:
            # Not kept in the metadata, and open_array ignores its own `config`: without this, a
            # shard of nothing but fill values would be dropped.
            with zarr.config.set({"array.write_empty_chunks": True}):
                self._opened[path] = zarr.open_array(store=self._store, path=path, mode="r+")
        return self._opened[path]


def _is_shard(key: str) -> bool:
    return _SHARD.search(key) is not None
