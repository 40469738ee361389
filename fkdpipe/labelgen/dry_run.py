"""Estimate what a generation takes, by making and measuring a small store."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fkdpipe.common.distributed import Rank
from fkdpipe.common.progress import Advance, Reporter, silent
from fkdpipe.labelgen import existing, generate, plan
from fkdpipe.labelgen.generate import Resources
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks.teachers import Teacher
from fkdpipe.pixels import images
from fkdpipe.pixels.images import ImageFolder
from fkdpipe.storage import schema, sizes
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.store import Store

SAMPLE_IMAGES = 32
SAMPLE_CROPS = 16


@dataclass(frozen=True)
class Forecast:
    """The estimate for a generation.

    Attributes:
        stored_bytes: of the finished store, if it compresses like the sample.
        seconds: for one process, measured on the sample from its second batch on.
        buffer_bytes: memory for the unit in progress (on disk above 1 GiB).
        gpu_bytes: peak GPU memory on the sample, 0 without a GPU.
        rejected: files of the folder that cannot be used.
    """

    images: int
    crops_per_image: int
    crops: int
    stored_bytes: int
    bytes_per_crop: float
    crops_per_s: float
    seconds: float
    buffer_bytes: int
    gpu_bytes: int
    units: int
    rejected: int
    sampled_crops: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast(
    data: Path,
    settings: GenerateSettings,
    teachers: Sequence[Teacher],
    resources: Resources,
    *,
    reporter: Reporter = silent,
) -> Forecast:
    """Scan the folder, make a store of a few images in a temporary folder, and extrapolate.

    Raises:
        ImagesError, UsageError: whatever a real run would refuse.
    """
    with reporter.task("scan", 0, "files") as advance:
        folder = images.scan(data, need_classes=False, on_image=advance)
    crops_M = existing.crops_per_image(None, settings)
    few = replace(settings, crops=min(crops_M, SAMPLE_CROPS), source="")
    some = _subset(folder, SAMPLE_IMAGES)
    with tempfile.TemporaryDirectory(prefix="fkdpipe-dry-run-") as temporary:
        location = LocalLocation(Path(temporary, "store"))
        work = plan.prepare(
            location, data, few, teachers, device=resources.device, folder=some, reporter=reporter
        )
        clock = _Clock(reporter)
        alone = replace(resources, rank=Rank())  # one process is enough for the small sample
        generate.generate(work, teachers, alone, reporter=clock)
        ended = time.perf_counter()
        stored = sizes.stored_bytes(work.store, sizes.field_names(work.store))
        fields = [field for part in work.parts for field in part.fields]
    sampled = len(some) * min(crops_M, SAMPLE_CROPS)
    # A few images do not fill a chunk, whose empty rest still takes space if it is not compressed.
    chunk = min(schema.CHUNK_IMAGES, work.store.unit_size)
    filled = len(some) / (-(-len(some) // chunk) * chunk)
    raw = {field.name for field in fields if field.codec == "raw"}
    once = _array_metadata_bytes(work.store)  # does not grow with the number of crops
    per_crop = -sum(n * (filled if name in raw else 1.0) for name, n in once.items()) / sampled
    for name, size in stored.items():
        if name not in ("images", "commits"):
            per_crop += size / sampled * (filled if name.rsplit("/", 1)[-1] in raw else 1.0)
    per_image = stored["images"] / len(some)
    crops = len(folder) * crops_M
    rate = max(1, sampled - clock.crops) / (ended - clock.since)
    per_image_buffer = schema.bytes_per_image(fields, crops_M)
    unit = schema.unit_images(per_image_buffer)
    cuda = resources.device.type == "cuda"
    return Forecast(
        images=len(folder),
        crops_per_image=crops_M,
        crops=crops,
        stored_bytes=round(crops * per_crop + len(folder) * per_image + once.total()),
        bytes_per_crop=per_crop,
        crops_per_s=rate,
        seconds=crops / rate,
        buffer_bytes=min(unit, len(folder)) * per_image_buffer,
        gpu_bytes=torch.cuda.max_memory_allocated(resources.device) if cuda else 0,
        units=-(-len(folder) // unit),
        rejected=len(folder.rejected),
        sampled_crops=sampled,
    )


def _array_metadata_bytes(store: Store) -> Counter[str]:
    """Bytes of the zarr.json files of all arrays except the list of images, by array name."""
    sizes_: Counter[str] = Counter()
    for part in store.parts.values():
        for key, text in part.metadata.items():
            if part.kind != "images" and key != f"{part.path}/zarr.json":
                sizes_[key.split("/")[-2]] += len(text)
    return sizes_


class _Clock:
    """A reporter that starts the clock after the first batch, to leave out start-up.

    Attributes:
        since: when that batch was done. crops: how many it had.
    """

    def __init__(self, inner: Reporter) -> None:
        self._inner = inner
        self.since, self.crops = 0.0, 0

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator[Advance]:
        begun = time.perf_counter()
        with self._inner.task(name, total, unit, done=done) as advance:

            def count(crops: int) -> None:
                if not self.since:  # a sample of a single batch is measured from its beginning
                    self.since, self.crops = begun, 0
                    if crops < total:
                        self.since, self.crops = time.perf_counter(), crops
                advance(crops)

            yield count


def _subset(folder: ImageFolder, count: int) -> ImageFolder:
    """Images spread evenly over the list, and so over its classes."""
    rows = np.unique(np.linspace(0, len(folder) - 1, min(count, len(folder))).round().astype(int))
    return replace(
        folder,
        keys=tuple(folder.keys[row] for row in rows),
        class_N=folder.class_N[rows],
        size_N2=folder.size_N2[rows],
        bytes_N=folder.bytes_N[rows],
    )
