"""Buffers of a unit in the making: memory, or local disk where they would not fit.

Teachers see a unit crop by crop while wide arrays are written crop group by crop group, so a unit
is held whole. Images are decoded once either way.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fkdpipe.storage import schema, writer
from fkdpipe.storage.store import Part

Buffers = dict[str, dict[str, np.ndarray]]


@contextlib.contextmanager
def buffers(parts: Sequence[Part], images: int, crops_M: int) -> Iterator[Buffers]:
    """Arrays of fill values for a unit, by part path and field name.

    Args:
        images: of the unit. crops_M: of the round.
    """
    needed = sum(schema.bytes_per_image(list(part.fields), crops_M) * images for part in parts)
    if needed <= schema.UNIT_BUFFER_BYTES:
        yield {
            part.path: {f.name: writer.fill_rows(f, images, crops_M) for f in part.fields}
            for part in parts
        }
        return
    with tempfile.TemporaryDirectory(prefix="fkdpipe-unit-") as folder:
        yield {part.path: _on_disk(part, images, crops_M, Path(folder)) for part in parts}


def _on_disk(part: Part, images: int, crops_M: int, folder: Path) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for field in part.fields:
        file = folder / f"{part.path.replace('/', '-')}-{field.name}"
        array = np.memmap(
            file, mode="w+", dtype=np.dtype(field.dtype), shape=(images, crops_M, *field.shape)
        )
        for row in range(images):  # a row at a time, so that pages can leave memory
            array[row] = field.fill
        made[field.name] = array
    return made
