"""What a generation would take, from doing a little of it: a small store made and measured."""

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
    """A generation not done yet.

    Attributes:
        stored_bytes: of the finished store; compression as in the sample.
        seconds: of one process as it was measured on the sample, from its second batch on.
        buffer_bytes: memory of a unit in the making (on disk above one GiB).
        gpu_bytes: peak memory of the GPU on the sample, 0 without one.
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
    """Scan the folder, make a store of a few images in a temporary place, and scale it up.

    Raises:
        ImagesError, UsageError: what a real run would refuse.
    """
    with reporter.task("scan", 0, "files") as advance:
        folder = images.scan(data, need_classes=False, on_image=advance)
    crops_M = existing.crops_per_image(None, settings)
    few = replace(settings, crops=min(crops_M, SAMPLE_CROPS), source="")
    some = _subset(folder, SAMPLE_IMAGES)
    with tempfile.TemporaryDirectory(prefix="fkdpipe-dry-run-") as place:
        location = LocalLocation(Path(place, "store"))
        made = plan.prepare(
            location, data, few, teachers, device=resources.device, folder=some, reporter=reporter
        )
        clock = _Clock(reporter)
        alone = replace(resources, rank=Rank())  # the sample is small, whoever shares the real run
        generate.generate(made, teachers, alone, reporter=clock)
        ended = time.perf_counter()
        stored = sizes.stored_bytes(made.store, sizes.field_names(made.store))
        fields = [field for part in made.parts for field in part.fields]
    sampled = len(some) * min(crops_M, SAMPLE_CROPS)
    # A few images do not fill a chunk, and what is not compressed keeps the empty rest of it.
    chunk = min(schema.CHUNK_IMAGES, made.store.unit_size)
    filled = len(some) / (-(-len(some) // chunk) * chunk)
    raw = {field.name for field in fields if field.codec == "raw"}
    once = _array_metadata_bytes(made.store)  # as large for a few crops as for millions
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
    """Bytes of the zarr.json of the arrays beside the list of images, by the array's name."""
    found: Counter[str] = Counter()
    for part in store.parts.values():
        for key, text in part.metadata.items():
            if part.kind != "images" and key != f"{part.path}/zarr.json":
                found[key.split("/")[-2]] += len(text)
    return found


class _Clock:
    """A reporter that lets the first batch pass before time counts: start-up is no part of it.

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
                if not self.since:  # of a sample of one batch there is nothing else to measure
                    self.since, self.crops = begun, 0
                    if crops < total:
                        self.since, self.crops = time.perf_counter(), crops
                advance(crops)

            yield count


def _subset(folder: ImageFolder, count: int) -> ImageFolder:
    """Images spread evenly over the list, so over its classes."""
    rows = np.unique(np.linspace(0, len(folder) - 1, min(count, len(folder))).round().astype(int))
    return replace(
        folder,
        keys=tuple(folder.keys[row] for row in rows),
        class_N=folder.class_N[rows],
        size_N2=folder.size_N2[rows],
        bytes_N=folder.bytes_N[rows],
    )
