"""Replay on the CPU: decode once, then torch's uint8 antialias resize, in threads.

torchvision decodes JPEG and WebP; Pillow decodes PNG, since torchvision's PNG decoder crashes the
process on damaged files. Both give the same pixels as DALI's CPU decoder. A crop is a view of the
decoded image, and the resize writes directly into one row of the batch, without worker processes.
For a single crop of a JPEG, only its region is decoded if nvImageCodec is installed (it comes with
DALI); the pixels are the same. `benchmarks/feed.py` measures both.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode

from fkdpipe.common import disk
from fkdpipe.pixels.replay import (
    DECODE_ERRORS,
    Backend,
    Failure,
    FailureCode,
    Pixels,
    Request,
    View,
    check,
    size_failure,
)

try:
    from fkdpipe.pixels.replay.region import decode_region
except ImportError:  # without nvImageCodec, whole images are decoded: same pixels, slower
    decode_region = None  # type: ignore[assignment]

# The kernels behind F.interpolate(antialias=True) and torchvision's resize, called with `out=` so
# that no crop is copied. A test compares them with torchvision.transforms.v2.functional.
_KERNELS = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


# torchvision.io.decode_image without its warning: torchvision 0.29 deprecates its decoders in
# favour of torchcodec, which older torch releases do not have. This is the one place to change.
_decode = torch.ops.image.decode_image


_BROKEN: tuple[type[Exception], ...] = (RuntimeError, *DECODE_ERRORS)  # what decoders raise


class CpuReplay:
    """See `replay.Replay`. Holds `prefetch` + 1 requests and `threads` decoded images in memory."""

    backend: Backend = "cpu"

    def __init__(self, views: Sequence[View], *, threads: int, prefetch: int) -> None:
        self.views = tuple(views)
        self.prefetch = max(1, prefetch)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="replay")
        self._buffers = _Buffers()
        _run_single_threaded(self._pool, threads)

    def run(self, requests: Iterable[Request]) -> Iterator[Pixels]:
        waiting: deque[_Job] = deque()
        try:
            for request in requests:
                check(request)
                waiting.append(self._start(request))
                if len(waiting) > self.prefetch:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for job in waiting:
                job.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, request: Request) -> _Job:
        rows = request.box_Im4.shape[0] * request.box_Im4.shape[1]
        batches = tuple(self._buffers.take(rows, view.size) for view in self.views)
        futures = [
            self._pool.submit(replay_image, request, image, self.views, batches)
            for image in range(len(request.paths))
        ]
        return _Job(request, batches, futures)


class _Job:
    """A request whose images are being replayed."""

    def __init__(
        self,
        request: Request,
        batches: tuple[torch.Tensor, ...],
        futures: list[Future[Failure | None]],
    ) -> None:
        self.request, self.batches, self.futures = request, batches, futures

    def result(self) -> Pixels:
        failures = tuple(f for f in (future.result() for future in self.futures) if f)
        return Pixels(self.request, self.batches, failures)

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()


class _Buffers:
    """Batches that are reused once no tensor refers to them.

    A torch tensor over a numpy array holds one reference to it, shared by all its views, so the
    array's reference count tells whether any of them is alive. With a GPU, torch's pinned
    allocator does the same and also waits for copies in flight.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._pin = torch.cuda.is_available()

    def take(self, rows: int, size: tuple[int, int]) -> torch.Tensor:
        shape = (rows, *size, 3)
        if self._pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True).permute(0, 3, 1, 2)
        idle = _idle(self._arrays)
        for k in idle:
            if self._arrays[k].shape == shape:
                return torch.from_numpy(self._arrays[k]).permute(0, 3, 1, 2)
        for k in reversed(idle):  # of a size that is no longer used
            del self._arrays[k]
        self._arrays.append(np.empty(shape, dtype=np.uint8))
        return torch.from_numpy(self._arrays[-1]).permute(0, 3, 1, 2)


def _reference_counts(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


_UNSHARED = _reference_counts([np.empty(1)])[0]  # references of the interpreter itself, measured


def _idle(arrays: list[np.ndarray]) -> list[int]:
    """Indices of the arrays that only the list refers to."""
    return [k for k, count in enumerate(_reference_counts(arrays)) if count <= _UNSHARED]


def replay_image(
    request: Request, image: int, views: tuple[View, ...], batches: tuple[torch.Tensor, ...]
) -> Failure | None:
    """Fill the rows of one image, or set them to zero and return the failure."""
    m = request.box_Im4.shape[1]
    boxes = [tuple(box) for box in request.box_Im4[image].tolist()]
    flips = request.flip_Im[image].tolist()
    crops = _crops(request.paths[image], tuple(request.size_I2[image].tolist()), boxes)
    if isinstance(crops, tuple):
        for batch in batches:
            batch[image * m : (image + 1) * m] = 0
        return Failure(image, *crops)
    for view, batch in zip(views, batches, strict=True):
        kernel, size = _KERNELS[view.interpolation], list(view.size)
        for k, (crop, flip) in enumerate(zip(crops, flips, strict=True)):
            row = batch[image * m + k, None]
            if flip:
                out = torch.empty_like(row)
                kernel(crop[None], size, False, out=out)
                row.copy_(out.flip(-1))
            else:
                kernel(crop[None], size, False, out=row)
    return None


def _crops(
    path: bytes, size: tuple[int, int], boxes: list[tuple[int, int, int, int]]
) -> list[torch.Tensor] | tuple[FailureCode, str]:
    """The boxes of an image as uint8 (3, height, width), not resized; or (code, detail)."""
    encoded = _read(path)
    if isinstance(encoded, tuple):
        return encoded
    if len(boxes) == 1 and decode_region is not None:
        region = decode_region(encoded, boxes[0], size)
        if region is not None:
            return [region]
    decoded = _decode_whole(encoded, size)
    if isinstance(decoded, tuple):
        return decoded
    return [decoded[:, top : top + h, left : left + w] for top, left, h, w in boxes]


def decode(path: bytes, size: tuple[int, int]) -> torch.Tensor | tuple[FailureCode, str]:
    """uint8 (3, H, W) in channels-last memory, EXIF orientation ignored; or (code, detail)."""
    encoded = _read(path)
    return encoded if isinstance(encoded, tuple) else _decode_whole(encoded, size)


def _read(path: bytes) -> np.ndarray | tuple[FailureCode, str]:
    try:
        encoded = disk.read_twice(lambda: _load(path))
    except OSError as error:
        return "not-the-file" if disk.may_pass(error) else "unreadable", _plain(str(error))
    return encoded if encoded.size else ("unreadable", "empty file")


def _load(path: bytes) -> np.ndarray:
    """uint8 content of a file. Unlike np.fromfile, a read error does not return a shorter array."""
    with open(path, "rb") as file:
        encoded = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8)
        return encoded[: file.readinto(encoded.data)]


def _decode_whole(
    encoded: np.ndarray, size: tuple[int, int]
) -> torch.Tensor | tuple[FailureCode, str]:
    png = encoded[:8].tobytes() == b"\x89PNG\r\n\x1a\n"
    if png and encoded[24:25].tobytes() == b"\x10":
        return "16-bit", "decodes to 16 bits per channel"
    try:
        image = _decode_png(encoded) if png else _decode_other(encoded)
    except UnidentifiedImageError:
        return "unreadable", "its header cannot be read"
    except _BROKEN as error:
        return "unreadable", _plain(str(error) or type(error).__name__)
    if image.dim() != 3:
        return "unreadable", "an animation, not a still image"
    if tuple(image.shape[1:]) != size:
        failure = size_failure(0, tuple(image.shape[1:]), size)
        return failure.code, failure.detail
    return image


def _decode_png(encoded: np.ndarray) -> torch.Tensor:
    with Image.open(io.BytesIO(encoded.tobytes()), formats=["PNG"]) as image:
        image.load()
        image.info.pop("transparency", None)  # dropped anyway; Pillow would warn
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _decode_other(encoded: np.ndarray) -> torch.Tensor:
    return _decode(torch.from_numpy(encoded), ImageReadMode.RGB.value, False)


def _plain(message: str) -> str:
    """An error message without the position in a decoder's source code and without the path."""
    words = re.sub(r"^\w+, \S+:\d+, |^\[Errno \d+\] ", "", message.splitlines()[0])
    return re.sub(r": b(['\"]).*\1$", "", words)


def _run_single_threaded(pool: ThreadPoolExecutor, threads: int) -> None:
    """Set one intra-op thread for every thread of the pool, and keep the caller's number.

    torch keeps the number per thread but initialises it lazily from a global, so it is read back
    after each change. Otherwise the main thread would get the workers' 1.
    """
    ours = torch.get_num_threads()
    together = threading.Barrier(threads)

    def one() -> None:
        together.wait()  # so that every thread of the pool runs this exactly once
        torch.set_num_threads(1)
        torch.get_num_threads()

    for future in [pool.submit(one) for _ in range(threads)]:
        future.result()
    torch.set_num_threads(ours)
    torch.get_num_threads()
