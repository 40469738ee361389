"""What a network's input is: size, interpolation, mean and standard deviation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from fkdpipe.common.errors import UsageError


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a network's input.

    Attributes:
        size: (height, width) in pixels. crop_pct: fraction of the resized image in the
            centre crop of evaluation. interpolation: "bilinear" or "bicubic". mean, std: per
            channel, of pixels scaled to 0..1.

    Raises:
        UsageError: a value that cannot be right.
    """

    size: tuple[int, int]
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UsageError(
                f"interpolation must be bilinear or bicubic; found {self.interpolation!r}."
            )
        mean = _three("mean", self.mean, lambda value: 0 <= value <= 1, "from 0 to 1")
        std = _three("std", self.std, lambda value: value > 0, "above 0")
        for name, value in (("size", sides(self.size)), ("mean", mean), ("std", std)):
            object.__setattr__(self, name, value)


def sides(size: Any) -> tuple[int, int]:
    """(height, width) in pixels, of one side or both.

    Raises:
        UsageError: something else.
    """
    both = (size, size) if isinstance(size, Integral) else size
    try:
        height, width = both
    except (TypeError, ValueError):
        height = width = None
    for side in (height, width):
        if not isinstance(side, Integral) or isinstance(side, bool) or side < 1:
            raise UsageError(f"size must be one side or (height, width) in pixels; found {size!r}.")
    return int(height), int(width)  # type: ignore[arg-type]


def _three(name: str, values: Any, valid: Any, range_: str) -> tuple[float, float, float]:
    try:
        red, green, blue = values
        numbers = (float(red), float(green), float(blue))
    except (TypeError, ValueError):
        numbers = (math.nan, math.nan, math.nan)
    if not all(isinstance(v, Real) and math.isfinite(v) and valid(v) for v in numbers):
        raise UsageError(
            f"{name} must be three numbers {range_}, of pixels scaled to 0..1; found {values!r}."
        )
    return numbers
