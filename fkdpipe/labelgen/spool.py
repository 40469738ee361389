"""Buffers of the unit in progress: in memory, or on local disk if they would not fit.

Teachers run image by image, but wide arrays are written one crop group at a time, so the whole unit
is buffered. This way each image is decoded only once.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fkdpipe.common.errors import FkdpipeError
from fkdpipe.storage import schema, writer
from fkdpipe.storage.store import Part

Buffers = dict[str, dict[str, np.ndarray]]


@contextlib.contextmanager
def buffers(parts: Sequence[Part], images: int, crops_M: int) -> Iterator[Buffers]:
    """Arrays of fill values for a unit, by part path and field name.

    Args:
        images: of the unit. crops_M: of the round.

    Raises:
        FkdpipeError: the local disk has too little space.
    """
    needed = sum(schema.bytes_per_image(list(part.fields), crops_M) * images for part in parts)
    if needed <= schema.UNIT_BUFFER_BYTES:
        yield {
            part.path: {f.name: writer.fill_rows(f, images, crops_M) for f in part.fields}
            for part in parts
        }
        return
    with tempfile.TemporaryDirectory(prefix="fkdpipe-unit-") as folder:
        try:
            arrays = {part.path: _on_disk(part, images, crops_M, Path(folder)) for part in parts}
        except OSError as error:
            raise FkdpipeError(
                f"the unit in progress needs {needed / 1e9:.1f} GB in {tempfile.gettempdir()}: "
                f"{error.strerror or error}. Set TMPDIR to a local folder with more space.",
                code="no-space",
            ) from error
        yield arrays


def _on_disk(part: Part, images: int, crops_M: int, folder: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for field in part.fields:
        file = folder / f"{part.path.replace('/', '-')}-{field.name}"
        array = np.memmap(
            file, mode="w+", dtype=np.dtype(field.dtype), shape=(images, crops_M, *field.shape)
        )
        # Allocate the space now: if the disk filled up later, a signal would kill the process.
        descriptor = os.open(file, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, 0, array.nbytes)
        finally:
            os.close(descriptor)
        for row in range(images):  # one row at a time, so that pages can leave memory
            array[row] = field.fill
        arrays[field.name] = array
    return arrays
