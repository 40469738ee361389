"""Zarr arrays in memory: where shards are encoded before they are written, and decoded after
their checksum was compared.

Zarr does the encoding, on an in-memory store; the bytes then travel through `location`, which
knows how to make them durable and how to read them from a disk or an object store alike. So data
are checked before they are decoded, and no code path writes part of a shard.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from fkdpipe.storage.schema import Json

_OPENING = threading.Lock()  # zarr.config is one for the whole process


class Arrays:
    """A Zarr hierarchy of metadata; shards pass through it one region at a time.

    Each thread opens an array for itself, so threads encode and decode side by side.
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
        """Shards (key to bytes) of a region that is made of whole shards."""
        array, blobs = self._open(path)
        array[region] = values
        keys = [key for key in blobs if key.startswith(f"{path}/c")]
        return {key: blobs.pop(key).to_bytes() for key in keys}

    def decode(self, path: str, region: tuple[slice, ...], shards: dict[str, bytes]) -> np.ndarray:
        """Values of a region from the shards it is made of; other shards read as fill."""
        array, blobs = self._open(path)
        blobs |= {key: cpu.Buffer.from_bytes(data) for key, data in shards.items()}
        try:
            return np.asarray(array[region])
        finally:
            for key in shards:
                del blobs[key]

    def _open(self, path: str) -> tuple[Any, dict[str, Any]]:
        """The array, and the objects it is made of."""
        opened = self._thread.__dict__.setdefault("opened", {})
        if path not in opened:
            key = f"{path}/zarr.json"
            blobs: dict[str, Any] = {key: cpu.Buffer.from_bytes(self._metadata[key])}
            store = MemoryStore(store_dict=blobs)
            # Not kept in the metadata, and open_array ignores its own `config`: without this, a
            # shard of nothing but fill values would be dropped.
            with _OPENING, zarr.config.set({"array.write_empty_chunks": True}):
                opened[path] = (zarr.open_array(store=store, path=path, mode="r+"), blobs)
        return opened[path]

    def _blobs(self) -> dict[str, Any]:
        return {key: cpu.Buffer.from_bytes(data) for key, data in self._metadata.items()}

    def _keep(self, blobs: dict[str, Any]) -> None:
        self._metadata = {key: blob.to_bytes() for key, blob in blobs.items()}
