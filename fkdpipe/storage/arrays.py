"""Zarr arrays in memory: shards are encoded here before they are written, and decoded after their
checksums are verified.

Zarr encodes into an in-memory store; `location` reads and writes the bytes, on disk or in an object
store. So checksums are verified before anything is decoded, and no code writes part of a shard.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from fkdpipe.storage.schema import Json

_OPENING = threading.Lock()  # zarr.config is global to the process


class Arrays:
    """The metadata of a Zarr hierarchy; shards are encoded and decoded one region at a time.

    Each thread opens its own arrays, so threads encode and decode in parallel.
    """

    def __init__(self) -> None:
        self._metadata: dict[str, bytes] = {}
        self._thread = threading.local()

    def add_group(self, path: str, attributes: Json) -> None:
        blobs = self._blobs()
        store = MemoryStore(store_dict=blobs)
        zarr.create_group(store=store, path=path, attributes=attributes, zarr_format=3)
        self._keep(blobs)

    def add_array(self, path: str, settings: Json) -> None:
        blobs = self._blobs()
        zarr.create_array(store=MemoryStore(store_dict=blobs), name=path, **settings)
        self._keep(blobs)

    def metadata(self) -> dict[str, bytes]:
        """Key and bytes of every zarr.json."""
        return dict(self._metadata)

    def load_metadata(self, key: str, data: bytes) -> None:
        self._metadata[key] = data

    def encode(self, path: str, region: tuple[slice, ...], values: np.ndarray) -> dict[str, bytes]:
        """Encode a region of whole shards; returns key to bytes."""
        array, blobs = self._open(path)
        array[region] = values
        keys = [key for key in blobs if key.startswith(f"{path}/c")]
        return {key: blobs.pop(key).to_bytes() for key in keys}

    def decode(self, path: str, region: tuple[slice, ...], shards: dict[str, bytes]) -> np.ndarray:
        """Decode a region from its shards; missing shards read as the fill value."""
        array, blobs = self._open(path)
        blobs |= {key: cpu.Buffer.from_bytes(data) for key, data in shards.items()}
        try:
            return np.asarray(array[region])
        finally:
            for key in shards:
                del blobs[key]

    def _open(self, path: str) -> tuple[Any, dict[str, Any]]:
        """The array, and the objects behind it by key."""
        opened = self._thread.__dict__.setdefault("opened", {})
        if path not in opened:
            key = f"{path}/zarr.json"
            blobs: dict[str, Any] = {key: cpu.Buffer.from_bytes(self._metadata[key])}
            store = MemoryStore(store_dict=blobs)
            # The metadata does not hold this setting, and open_array ignores its `config` argument.
            # Without it, a shard of only fill values would be dropped.
            with _OPENING, zarr.config.set({"array.write_empty_chunks": True}):
                opened[path] = (zarr.open_array(store=store, path=path, mode="r+"), blobs)
        return opened[path]

    def _blobs(self) -> dict[str, Any]:
        return {key: cpu.Buffer.from_bytes(data) for key, data in self._metadata.items()}

    def _keep(self, blobs: dict[str, Any]) -> None:
        self._metadata = {key: blob.to_bytes() for key, blob in blobs.items()}
