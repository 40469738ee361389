"""Replay: turn encoded images and recorded crops into pixels.

Both phases use this package, so the student sees exactly the pixels that the teacher saw. There are
two backends: `cpu` (decode, then torch's uint8 antialias resize in threads) and `dali` (one DALI
graph). Within a backend, the pixels of a crop are bit-identical whatever its batch, the order and
the number of threads. Between backends they differ slightly, so a store records the one that made
its labels.

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
# "not-the-file": the disk or the decoder failed; the next run may be able to read the file.
FailureCode = Literal["unreadable", "size-differs", "16-bit", "not-the-file"]

# Whatever Pillow's parsers raise on a damaged file.
DECODE_ERRORS: tuple[type[Exception], ...] = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError,
    EOFError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

log = logging.getLogger(__name__)


class Preprocessing(Protocol):
    """What `View` needs from `fkdpipe.networks.models.Preprocessing`."""

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def interpolation(self) -> Interpolation: ...


@dataclass(frozen=True)
class View:
    """How a crop is resized for a network.

    Attributes:
        size: (height, width) in pixels that the crop is resized to.
        interpolation: kernel of the resize; both antialias.
    """

    size: tuple[int, int]
    interpolation: Interpolation = "bilinear"

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> Self:
        """The view of a network's preprocessing."""
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
        size_I2: recorded (height, width) of each decoded image; other sizes are failures.
        box_Im4: (top, left, height, width) in pixels.
        flip_Im: mirror horizontally after resizing.
        tag: any value, returned with the pixels.
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
    """An image of a request without pixels; its rows are zero."""

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
        """Replay requests in order, prefetching a bounded number of them."""

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
        threads: threads that decode (and, on the CPU, resize).
        prefetch: requests replayed ahead of the consumer.
        device: where the `dali` graph resizes and, if it is a CUDA device, decodes.

    Raises:
        UsageError: unknown backend.
        ReplayError: DALI is requested but not installed.
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
                "fkdpipe[cuda12], whichever CUDA your torch has, or use --replay cpu.",
                code="no-dali",
            ) from error
        return DaliReplay(views, threads=threads, prefetch=prefetch, device=device)
    raise UsageError(f"replay must be auto, cpu or dali; found {backend!r}.")


def check(request: Request) -> None:
    """Refuse boxes that reach outside their image; a slice would clip them silently.

    Raises:
        ReplayError: names the first such image.
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
    """Refuse temporary failures, for results that are stored: only a broken file may be recorded.

    Raises:
        ReplayError: names the first image whose failure may be temporary.
    """
    for failure in pixels.failures:
        if failure.code == "not-the-file":
            raise ReplayError(
                f"{os.fsdecode(pixels.request.paths[failure.image])}: {failure.detail}. This error "
                "may be temporary, so the image is not left out. Run the same command again to "
                "resume; if it fails again, repair or remove the file.",
                code=failure.code,
            )


def choose_backend(choice: BackendChoice, device: torch.device, sample: Request) -> Backend:
    """Resolve `auto`: `dali` on a GPU if it passes a self-check on a few crops, else `cpu`.

    Args:
        sample: a few crops of the data, for the self-check.
    """
    if choice != "auto":
        return choice
    if device.type != "cuda":
        return "cpu"
    problem = self_check(sample, device)
    if problem:
        log.warning("replay: using the cpu backend; dali: %s", problem)
        return "cpu"
    return "dali"


def self_check(sample: Request, device: torch.device, view: View | None = None) -> str | None:
    """Check that the dali backend gives the same pixels alone, in a batch and in another order.

    Returns:
        The problem as text, or None.
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
                for row, image in enumerate(order):
                    if row in failed:
                        continue
                    first = seen.setdefault(image, rows[row].clone())
                    if not torch.equal(first, rows[row]):
                        return f"the pixels of {sample.paths[image]!r} depend on its batch"
    except (ReplayError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def subset(request: Request, images: list[int]) -> Request:
    """A request for some of the images of another."""
    return Request(
        paths=[request.paths[k] for k in images],
        size_I2=request.size_I2[images],
        box_Im4=request.box_Im4[images],
        flip_Im=request.flip_Im[images],
        tag=request.tag,
    )


def size_failure(image: int, found: tuple[int, ...], recorded: tuple[int, ...]) -> Failure:
    """The failure of an image that decodes to another (height, width) than was recorded."""
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
    """Package versions that determine a backend's pixels, for provenance."""
    names = {
        "cpu": ("torch", "torchvision", "nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
        "dali": (
            "nvidia-dali-cuda130",
            "nvidia-dali-cuda120",
            "nvidia-nvimgcodec-cu13",
            "nvidia-nvimgcodec-cu12",
        ),
    }[backend]
    installed = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
