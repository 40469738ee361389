"""Replay as one DALI graph: read, decode once, then slice, resize and flip each crop.

Only this file imports nvidia.dali. On a GPU, nvJPEG decodes with `hw_decoder_load` 0 and fancy
upsampling: with DALI's default load, an image's pixels depend on the other images of its batch. On
the CPU the same graph is built, so that it can be tested there.

The graph is unrolled over the m crops, so it is rebuilt when m changes. `external_source` feeds it
the paths and boxes of the requests; DALI reads the image files.

Two kinds of files are left to the cpu replay, so that both backends read the same files: JPEGs of
four components (CMYK), which DALI turns black without an Adobe marker, and files that only DALI
refuses, such as a PNG with a wrong checksum.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from fkdpipe.pixels.replay import (
    Backend,
    Failure,
    Interpolation,
    Pixels,
    Request,
    View,
    check,
    size_failure,
    subset,
)
from fkdpipe.pixels.replay.cpu import replay_image

log = logging.getLogger(__name__)

_KERNELS: dict[Interpolation, Any] = {
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
}
_JPEG = b"\xff\xd8\xff"
# Errors of DALI's decoders and parsers; others need not come from the file.
_REFUSED = re.compile("Failed to decode|operator `nvidia.dali.fn.peek_image_shape`")
_OUT_OF_MEMORY = re.compile("out of memory|MemoryAllocation|bad_?alloc", re.IGNORECASE)
# path, top-left, height-width, flip
_DTYPES = [types.UINT8, types.INT32, types.INT32, types.INT32]
_NDIMS = [1, 2, 2, 1]


class DaliReplay:
    """See `fkdpipe.pixels.replay.Replay`."""

    backend: Backend = "dali"

    def __init__(
        self,
        views: Sequence[View],
        *,
        threads: int,
        prefetch: int,
        device: torch.device | None = None,
        hw_decoder_load: float = 0.0,
    ) -> None:
        """hw_decoder_load: share of a batch for the hardware JPEG decoder; keep it at 0."""
        self.views = tuple(views)
        self.threads, self.prefetch = threads, max(1, prefetch)
        self.device = device if device is not None and device.type == "cuda" else None
        self.hw_decoder_load = hw_decoder_load

    def run(self, requests: Iterable[Request]) -> Iterator[Pixels]:
        """Groups of equal m share one graph; a failed batch is replayed image by image."""
        for m, group in itertools.groupby(requests, key=lambda r: r.box_Im4.shape[1]):
            yield from self._run_group(m, group)

    def close(self) -> None:
        """Nothing to close: each graph ends with its group of requests."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run_group(self, m: int, requests: Iterator[Request]) -> Iterator[Pixels]:
        fed: deque[Request] = deque()  # fed to the graph, not yet delivered
        source = _Source(requests, fed)
        while source.more():
            graph = self._build(m, source.begin(), source)
            while True:
                try:
                    outputs = self._step(graph)
                except torch.cuda.OutOfMemoryError:
                    raise  # not caused by a file; phase 1 retries with a smaller batch
                except RuntimeError as error:
                    # DALI does not name or skip the file: replay this request image by image.
                    log.debug("dali: %s", error)
                    if not fed:
                        raise
                    yield self._one_by_one(fed.popleft())
                    break
                if outputs is None:
                    break
                yield self._deliver(fed.popleft(), outputs)

    def _build(self, m: int, images: int, source: Any) -> Pipeline:
        graph = Pipeline(
            batch_size=images,
            num_threads=self.threads,
            device_id=None if self.device is None else (self.device.index or 0),
            prefetch_queue_depth=self.prefetch,
        )
        with graph:
            path, start, shape, flip = fn.external_source(
                source, num_outputs=4, dtype=_DTYPES, ndim=_NDIMS
            )
            encoded = fn.io.file.read(path)
            crops = _crops(encoded, start, shape, m, self._decoder(), whole=self.device is not None)
            outputs = []
            for view in self.views:
                for k in range(m):
                    resized = fn.resize(
                        crops[k],
                        size=list(view.size),
                        interp_type=_KERNELS[view.interpolation],
                        antialias=True,
                    )
                    outputs.append(fn.flip(resized, horizontal=flip[k]))
            head = fn.slice(encoded, 0, 3, axes=[0], out_of_bounds_policy="trim_to_shape")
            found = fn.peek_image_shape(
                encoded, adjust_orientation=False, image_type=types.ANY_DATA
            )
            graph.set_outputs(found, head, *outputs)
        graph.build()
        return graph

    def _decoder(self) -> dict[str, Any]:
        options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
        if self.device is not None:
            options |= {
                "device": "mixed",
                "hw_decoder_load": self.hw_decoder_load,
                "jpeg_fancy_upsampling": True,
            }
        return options

    def _step(self, graph: Pipeline) -> tuple[Any, ...] | None:
        try:
            if self.device is not None:
                return graph.run(torch.cuda.current_stream(self.device))
            return graph.run()
        except StopIteration:
            return None
        except RuntimeError as error:
            if self.device is not None and _OUT_OF_MEMORY.search(str(error)):
                raise torch.cuda.OutOfMemoryError(f"DALI: {error}") from error
            raise

    def _deliver(self, request: Request, outputs: tuple[Any, ...]) -> Pixels:
        shapes, heads, *crops = outputs
        m = request.box_Im4.shape[1]
        views = tuple(_interleave(crops[v * m : (v + 1) * m]) for v in range(len(self.views)))
        failures = []
        for image in range(len(request.paths)):
            *found, components = (int(side) for side in np.asarray(shapes.at(image)))
            recorded = tuple(request.size_I2[image].tolist())
            if tuple(found) != recorded:
                failures.append(size_failure(image, tuple(found), recorded))
                for view in views:
                    view[image * m : (image + 1) * m] = 0
            elif components == 4 and np.asarray(heads.at(image)).tobytes() == _JPEG:
                failures += self._on_cpu(request, image, views)
        return Pixels(request, views, tuple(failures))

    def _on_cpu(
        self, request: Request, image: int, views: tuple[torch.Tensor, ...]
    ) -> list[Failure]:
        """Fill one image's rows of a request with the pixels of the cpu replay."""
        m = request.box_Im4.shape[1]
        rows = tuple(
            torch.empty((m, *view.size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
            for view in self.views
        )
        failure = replay_image(subset(request, [image]), 0, self.views, rows)
        for view, pixels in zip(views, rows, strict=True):
            view[image * m : (image + 1) * m] = pixels
        return [] if failure is None else [replace(failure, image=image)]

    def _one_by_one(self, request: Request) -> Pixels:
        """Replay a request image by image; rows of images that fail stay zero."""
        images, m = request.box_Im4.shape[:2]
        views = tuple(
            torch.zeros((images * m, *view.size, 3), dtype=torch.uint8, device=self.device)
            for view in self.views
        )
        views = tuple(view.permute(0, 3, 1, 2) for view in views)
        failures = []
        for image in range(images):
            alone = subset(request, [image])
            source = _Source(iter([alone]), deque())
            try:
                outputs = self._step(self._build(m, source.begin(), source))
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # The cpu backend reads the file or describes what is wrong with it.
                failed = self._on_cpu(request, image, views)
                if not failed and not _REFUSED.search(str(error)):
                    why = str(error).splitlines()[0]
                    why = f"the cpu replay decodes it, DALI does not: {why}"
                    failed = [Failure(image, "not-the-file", why)]
                    for view in views:
                        view[image * m : (image + 1) * m] = 0
                failures += failed
                continue
            assert outputs is not None
            result = self._deliver(alone, outputs)
            failures += [Failure(image, f.code, f.detail) for f in result.failures]
            for view, pixels in zip(views, result.views, strict=True):
                view[image * m : (image + 1) * m] = pixels
        return Pixels(request, views, tuple(failures))


class _Source:
    """Feeds requests to a graph, and feeds them again to the next graph after an error."""

    def __init__(self, requests: Iterator[Request], fed: deque[Request]) -> None:
        self._requests = requests
        self._fed = fed
        self._again: deque[Request] = deque()
        self._next: Request | None = next(requests, None)
        self._limit = 0

    def more(self) -> bool:
        """Are there requests that no graph has delivered?"""
        return bool(self._fed) or self._next is not None

    def begin(self) -> int:
        """Start feeding a new graph; returns how many images its batches must hold."""
        self._again = deque(self._fed)
        known = [*self._fed, *([self._next] if self._next is not None else [])]
        self._limit = max(len(request.paths) for request in known)
        return self._limit

    def __call__(self) -> tuple[list[np.ndarray], ...]:
        if self._again:
            request = self._again.popleft()
        elif self._next is None or len(self._next.paths) > self._limit:
            raise StopIteration  # done, or the next graph must be wider
        else:
            request, self._next = self._next, next(self._requests, None)
            check(request)
            self._fed.append(request)
        box_Im4 = request.box_Im4.astype(np.int32)
        return (
            [np.frombuffer(os.path.abspath(path), dtype=np.uint8) for path in request.paths],
            list(np.ascontiguousarray(box_Im4[..., :2])),
            list(np.ascontiguousarray(box_Im4[..., 2:])),
            list(request.flip_Im.astype(np.int32)),
        )


def _crops(
    encoded: Any, start: Any, shape: Any, m: int, decoder: dict[str, Any], *, whole: bool
) -> list[Any]:
    """m crops of each image, not resized. For a single crop, only its region is decoded. On a GPU
    the whole image is always decoded, so that pixels cannot depend on m."""
    if m == 1 and not whole:
        return [fn.decoders.image_slice(encoded, start[0], shape[0], axis_names="HW", **decoder)]
    image = fn.decoders.image(encoded, **decoder)
    return [fn.slice(image, start[k], shape[k], axis_names="HW") for k in range(m)]


def _interleave(crops_m: list[Any]) -> torch.Tensor:
    """m DALI batches (I, H, W, 3) as one uint8 (I * m, 3, H, W), image-major. m = 1: no copy."""
    tensors = [torch.from_dlpack(crops.as_tensor()) for crops in crops_m]
    joined = tensors[0] if len(tensors) == 1 else torch.stack(tensors, dim=1).flatten(0, 1)
    return joined.permute(0, 3, 1, 2)
