"""Encoded images and recorded crops become pixels: the one place where that happens.

Both phases replay through here, which is what makes "the student sees exactly what the teacher
saw" true by construction. Two backends, one meaning: `cpu` (decode, then torch's uint8 antialias
resize in threads) and `dali` (one DALI graph). Within a backend the pixels of a crop are
bit-identical whatever its batch, order, company or thread count; between backends they differ
slightly, so a store names the one that made its labels.

Pixels are uint8; `normalise` runs on the device afterwards, once for both backends.

Shapes: I images in a request, m crops of each, row = image * m + crop.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
import torch
from PIL import Image

from fkdpipe.common.errors import ReplayError, UsageError
from fkdpipe.pixels import images
from fkdpipe.pixels.crops import Crops, boxes_outside

Backend = Literal["cpu", "dali"]
BackendChoice = Literal["auto", "cpu", "dali"]
Interpolation = Literal["bilinear", "bicubic"]
# "not-the-file": the disk or the decoder failed; the next run may well read the same file.
FailureCode = Literal["unreadable", "size-differs", "16-bit", "not-the-file"]

# Whatever Pillow's parsers raise on a damaged file.
DECODE_ERRORS: tuple[type[Exception], ...] = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError,
    EOFError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

log = logging.getLogger(__name__)


class Preprocessing(Protocol):
    """What `View` needs to know of `fkdpipe.networks.models.Preprocessing`."""

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def interpolation(self) -> Interpolation: ...


@dataclass(frozen=True)
class View:
    """What a network wants to see of a crop.

    Attributes:
        size: (height, width) in pixels the crop is resized to.
        interpolation: kernel of the resize; both antialias.
    """

    size: tuple[int, int]
    interpolation: Interpolation = "bilinear"

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> Self:
        """What a network's preprocessing asks for."""
        return cls(preprocessing.size, preprocessing.interpolation)

    def __post_init__(self) -> None:
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UsageError(
                f"interpolation must be bilinear or bicubic; found {self.interpolation!r}."
            )
        if min(self.size) < 1:
            raise UsageError(f"a view needs a positive size; found {self.size}.")


@dataclass(frozen=True)
class Request:
    """Crops to replay: m of each of I images.

    Attributes:
        paths: the image files, as the operating system's bytes.
        size_I2: recorded (height, width) of each decoded image; another size is a failure.
        box_Im4: (top, left, height, width) in pixels.
        flip_Im: mirror horizontally after resizing.
        tag: anything the caller wants back with the pixels.
    """

    paths: Sequence[bytes]
    size_I2: np.ndarray
    box_Im4: np.ndarray
    flip_Im: np.ndarray
    tag: object = None

    @classmethod
    def of(
        cls,
        root: Path,
        keys: Sequence[str] | np.ndarray,
        size_I2: np.ndarray,
        recorded: Crops,
        tag: object = None,
    ) -> Self:
        """Recorded crops of images below a folder.

        Raises:
            ImagesError: a key points outside the folder.
        """
        paths = [images.path_of(root, key) for key in keys]
        return cls(paths, size_I2, recorded.box_NM4, recorded.flip_NM, tag)


@dataclass(frozen=True)
class Failure:
    """An image of a request that gave no pixels; its rows are zero."""

    image: int
    code: FailureCode
    detail: str


@dataclass(frozen=True)
class Pixels:
    """A replayed request.

    Attributes:
        views: for each view, uint8 (I * m, 3, height, width) in channels-last memory.
        failures: images without pixels.
    """

    request: Request
    views: tuple[torch.Tensor, ...]
    failures: tuple[Failure, ...]


class Replay(Protocol):
    """A backend, ready to run. Close it, or use it in a `with` block."""

    backend: Backend

    def run(self, requests: Iterable[Request]) -> Iterator[Pixels]:
        """Replay requests in order, reading ahead of the consumer by a bounded amount."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_replay(
    backend: Backend,
    views: Sequence[View],
    *,
    threads: int = 2,
    prefetch: int = 2,
    device: torch.device | None = None,
) -> Replay:
    """Start a backend.

    Args:
        views: every crop is resized to each of them.
        threads: decoding (and, on the CPU, resizing) threads.
        prefetch: requests made ahead of the consumer.
        device: where the `dali` graph resizes; a CUDA device also decodes there.

    Raises:
        UsageError: unknown backend.
        ReplayError: DALI is asked for and not installed.
    """
    if backend == "cpu":
        from fkdpipe.pixels.replay.cpu import CpuReplay

        return CpuReplay(views, threads=threads, prefetch=prefetch)
    if backend == "dali":
        try:
            from fkdpipe.pixels.replay.dali import DaliReplay
        except ImportError as error:
            raise ReplayError(
                f"the dali backend needs NVIDIA DALI ({error}). Install fkdpipe[cuda13] or "
                "fkdpipe[cuda12], whichever CUDA your torch has, or take --replay cpu.",
                code="no-dali",
            ) from error
        return DaliReplay(views, threads=threads, prefetch=prefetch, device=device)
    raise UsageError(f"replay must be auto, cpu or dali; found {backend!r}.")


def check(request: Request) -> None:
    """Refuse boxes that reach outside their image; a slice would cut them silently.

    Raises:
        ReplayError: naming the first image concerned.
    """
    bad = boxes_outside(request.box_Im4, request.size_I2)
    if bad.any():
        image, crop = (int(k) for k in np.argwhere(bad)[0])
        raise ReplayError(
            f"{os.fsdecode(request.paths[image])}: box {request.box_Im4[image, crop].tolist()} "
            f"(top, left, height, width) is not inside {request.size_I2[image].tolist()} "
            "(height, width).",
            code="box-outside",
        )


def refuse_passing(pixels: Pixels) -> None:
    """For what is made once and kept: only what is wrong with a file itself may be recorded of it.

    Raises:
        ReplayError: naming the first image whose failure may pass.
    """
    for failure in pixels.failures:
        if failure.code == "not-the-file":
            raise ReplayError(
                f"{os.fsdecode(pixels.request.paths[failure.image])}: {failure.detail}. This may "
                "pass, so the image is not left out for good. The same command goes on from here; "
                "if it fails again, mend the file or remove it.",
                code=failure.code,
            )


def choose_backend(choice: BackendChoice, device: torch.device, sample: Request) -> Backend:
    """Resolve `auto`: `dali` on a GPU when it proves itself on a few crops, else `cpu`.

    Args:
        sample: a few crops of the data at hand, for the self-check.
    """
    if choice != "auto":
        return choice
    if device.type != "cuda":
        return "cpu"
    problem = self_check(sample, device)
    if problem:
        log.warning("replay: taking the cpu backend; dali: %s", problem)
        return "cpu"
    return "dali"


def self_check(sample: Request, device: torch.device, view: View | None = None) -> str | None:
    """Do crops keep their pixels alone, in other company and in another order (dali backend)?

    Returns:
        What is wrong, or None.
    """
    view = view or View((64, 64))
    count = len(sample.paths)
    orders = [list(range(count)), list(range(count))[::-1], *([k] for k in range(min(count, 4)))]
    seen: dict[int, torch.Tensor] = {}
    try:
        with open_replay("dali", [view], device=device) as replay:
            for order, pixels in zip(
                orders, replay.run(subset(sample, order) for order in orders), strict=True
            ):
                failed = {failure.image for failure in pixels.failures}
                rows = pixels.views[0].unflatten(0, (len(order), -1))
                for place, image in enumerate(order):
                    if place in failed:
                        continue
                    first = seen.setdefault(image, rows[place].clone())
                    if not torch.equal(first, rows[place]):
                        return f"{sample.paths[image]!r} changes its pixels with its batch"
    except (ReplayError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def subset(request: Request, images: list[int]) -> Request:
    """The same request for some of its images."""
    return Request(
        paths=[request.paths[k] for k in images],
        size_I2=request.size_I2[images],
        box_Im4=request.box_Im4[images],
        flip_Im=request.flip_Im[images],
        tag=request.tag,
    )


def size_failure(image: int, found: tuple[int, ...], recorded: tuple[int, ...]) -> Failure:
    """An image that decodes to another (height, width) than the record says."""
    now, then = (f"{height}x{width}" for height, width in (found, recorded))
    return Failure(image, "size-differs", f"decodes to {now} (height x width), recorded {then}")


def normalise(
    pixels_B3HW: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """float32 (x / 255 - mean) / std per channel, bit-equal to torchvision's ToTensor, Normalize.

    Args:
        pixels_B3HW: uint8; the memory format is kept.
    """
    x = pixels_B3HW.to(torch.float32).div_(255)
    shape = (1, 3, 1, 1)
    x.sub_(torch.tensor(mean, device=x.device).view(shape))
    return x.div_(torch.tensor(std, device=x.device).view(shape))


def versions(backend: Backend) -> dict[str, str]:
    """Package versions that decide a backend's pixels, for provenance."""
    names = {
        "cpu": ("torch", "torchvision", "nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
        "dali": (
            "nvidia-dali-cuda130",
            "nvidia-dali-cuda120",
            "nvidia-nvimgcodec-cu13",
            "nvidia-nvimgcodec-cu12",
        ),
    }[backend]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
