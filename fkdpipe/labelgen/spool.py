"""Buffers of a unit in the making: memory, or local disk where they would not fit.

Teachers see a unit crop by crop while wide arrays are written crop group by crop group, so a unit
is held whole. Images are decoded once either way.
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
            made = {part.path: _on_disk(part, images, crops_M, Path(folder)) for part in parts}
        except OSError as error:
            raise FkdpipeError(
                f"a unit in the making needs {needed / 1e9:.1f} GB in {tempfile.gettempdir()}: "
                f"{error.strerror or error}. Set TMPDIR to a local folder with more space.",
                code="no-space",
            ) from error
        yield made


def _on_disk(part: Part, images: int, crops_M: int, folder: Path) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for field in part.fields:
        file = folder / f"{part.path.replace('/', '-')}-{field.name}"
        array = np.memmap(
            file, mode="w+", dtype=np.dtype(field.dtype), shape=(images, crops_M, *field.shape)
        )
        # Take the space now: a mapped file on a disk that is full ends the process by a signal.
        descriptor = os.open(file, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, 0, array.nbytes)
        finally:
            os.close(descriptor)
        for row in range(images):  # a row at a time, so that pages can leave memory
            array[row] = field.fill
        made[field.name] = array
    return made
