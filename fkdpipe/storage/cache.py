"""The local cache: narrow arrays of a part as flat memory-mapped files, filled once per node.

Training never reads single images from Zarr. To fill the cache, whole shards are read, their
checksums verified and their values written to `.npy` files, which every rank and worker of the node
maps. A cache belongs to one manifest: a store that changes gets a new manifest, and so a new cache.
It is filled under a temporary name and renamed when complete, so a killed process leaves no partial
cache behind; a file lock lets one process fill it while the others wait. Its checksums are verified
again at every start.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np

from fkdpipe.common import disk, words
from fkdpipe.common.errors import StoreError
from fkdpipe.storage import commits, rounds, schema
from fkdpipe.storage.commits import BrokenRecordError, Manifest
from fkdpipe.storage.schema import Field
from fkdpipe.storage.store import Part, Store

log = logging.getLogger(__name__)

THREADS = 2  # shards decoded in parallel; more threads are no faster
_BLOCK = 2**24


def default_cache_dir() -> Path:
    """Local temporary space, one folder per user; never a home directory on a network."""
    return Path(tempfile.gettempdir()) / f"fkdpipe-cache-{os.getuid()}"


def folder_of(cache_dir: Path, part: Part, manifest: Manifest) -> Path:
    """The folder of the cache for this part in this state."""
    name = hashlib.sha256(manifest.to_bytes())
    for key, text in sorted(part.metadata.items()):
        name.update(key.encode() + text)
    return cache_dir / name.hexdigest()[:32]


def fill(
    store: Store,
    part: Part,
    manifest: Manifest,
    cache_dir: Path,
    *,
    on_images: Callable[[int], None] = lambda count: None,
) -> dict[str, np.ndarray]:
    """Narrow fields of a part as read-only memory maps (N, M, ...); the first call fills the cache.

    Rows of units that the manifest does not hold are zero.

    Args:
        on_images: called with the number of images that became available, for progress.

    Raises:
        DamagedStoreError: a shard differs from what was committed; no cache is left.
        StoreError: too little space for the cache. UsageError: `cache_dir` is a URL.
    """
    cache_dir = disk.local_path(cache_dir)
    fields = narrow_fields(part)
    folder = folder_of(cache_dir, part, manifest)
    with _writable(cache_dir), _locked(cache_dir, folder.name):
        problems = check(folder) if folder.is_dir() else ["missing"]
        if problems:
            if folder.is_dir():
                log.warning("cache %s: %s; filling it again", folder, "; ".join(problems))
                shutil.rmtree(folder)
            _copy(store, part, manifest, fields, folder, on_images)
        else:
            on_images(store.num_images)
    return {
        field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r", allow_pickle=False)
        for field in fields
    }


def narrow_fields(part: Part) -> list[Field]:
    """Fields to cache; for a round with derived boxes, the fields that are derived."""
    if part.kind == "crops" and part.settings.derived:
        return rounds.fields_of(part.settings)
    return [field for field in part.fields if field.per_crop and not field.wide]


def check(folder: Path) -> list[str]:
    """Problems of a cache folder, as text; empty if all checksums match."""
    try:
        body = commits.open_record((folder / "cache.json").read_bytes())
    except (OSError, BrokenRecordError) as error:
        return [f"cache.json: {error}"]
    if body.get("folder") != folder.name:
        return ["cache.json: belongs to another cache"]
    problems = []
    for name, expected in body["files"].items():
        path = folder / name
        actual = _file_crc(path) if path.is_file() else None
        if actual != expected:
            problems.append(f"{name} {'is missing' if actual is None else 'has changed'}")
    return problems


def _copy(
    store: Store,
    part: Part,
    manifest: Manifest,
    fields: list[Field],
    folder: Path,
    on_images: Callable[[int], None],
) -> None:
    count = part.settings.crops
    _require_space(store, fields, count, folder.parent)
    for left in folder.parent.glob(f"{folder.name}.*.partial"):
        shutil.rmtree(left)  # left by a killed process: we hold the lock
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        maps = {
            field.name: _new_map(
                partial / f"{field.name}.npy",
                np.dtype(field.dtype),
                (store.num_images, count, *field.shape),
            )
            for field in fields
        }
        for unit, values in _units(store, part, manifest, fields):
            rows = store.unit_rows(unit)
            for name, value in values.items():
                maps[name][rows] = value
            on_images(rows.stop - rows.start)
        for array in maps.values():
            array.flush()
        del maps
        files = {f"{field.name}.npy": _file_crc(partial / f"{field.name}.npy") for field in fields}
        record = commits.seal_record({"folder": folder.name, "files": files})
        (partial / "cache.json").write_bytes(record)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _new_map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A new memory-mapped array, with its disk space allocated now: if the disk filled up later, a
    signal would kill the process without a message."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def _units(
    store: Store, part: Part, manifest: Manifest, fields: list[Field]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Values of every unit in the manifest, reading a few units ahead."""

    def read(unit: int) -> tuple[int, dict[str, np.ndarray]]:
        if part.kind == "crops" and part.settings.derived:
            return unit, rounds.values_of(rounds.derive(store, part, unit, manifest.facts[unit]))
        values = {f.name: store.read(part, f.name, unit, files=manifest.files) for f in fields}
        return unit, values

    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque = deque()
        for unit in manifest.facts:
            if len(waiting) == THREADS:
                yield waiting.popleft().result()
            waiting.append(pool.submit(read, unit))
        while waiting:
            yield waiting.popleft().result()


def _require_space(store: Store, fields: list[Field], crops_M: int, folder: Path) -> None:
    needed = store.num_images * schema.bytes_per_image(fields, crops_M)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"the label cache needs {words.size(needed)} and {folder} has "
            f"{words.size(free)} free. Choose a larger local folder with --cache.",
            code="cache-full",
        )


def _file_crc(path: Path) -> str:
    total = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            total = google_crc32c.extend(total, block)
    return f"{total:08x}"


@contextlib.contextmanager
def _writable(cache_dir: Path) -> Iterator[None]:
    """Turn an OSError of the cache's disk into a StoreError; the store raises its own."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"the label cache {cache_dir} cannot be written: {error.strerror or error}. Choose a "
            "local folder of your own, with enough space, with --cache.",
            code="cache-full",
        ) from error


@contextlib.contextmanager
def _locked(cache_dir: Path, name: str) -> Iterator[None]:
    """Let one process of the node in at a time; the lock is released when its holder exits."""
    cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(cache_dir / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is filling the label cache %s; waiting for it", cache_dir)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
