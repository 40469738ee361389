"""How feature vectors are stored: as float16, or as int8 of the cube root.

    code      arrays                                    error
    float16   value (N, M, D) float16                   2^-11 of each value, at least 2^-25
    int8      code (N, M, D) int8, scale (N, M) float32 1.5/127 of the largest, far less near zero

The int8 code quantises the cube root of each value. KDEP's transformation has an infinite slope at
zero, so quantising the values themselves would give a forty times larger error after it.
Letters: N images, M crops, D dimensions, B rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from fkdpipe.storage.schema import Field

Code = Literal["float16", "int8"]

_LEVELS = 127


def fields(dims: int, code: Code) -> list[Field]:
    """Arrays of `rounds/<r>/features/<source>/<layer>`."""
    if code == "float16":
        return [Field("value", "float16", (dims,), "raw", math.nan, wide=True)]
    return [
        Field("code", "int8", (dims,), "raw", -128, wide=True),
        Field("scale", "float32", (), "bitshuffle", math.nan, wide=True),
    ]


def encode(code: Code, features_BD: np.ndarray) -> dict[str, np.ndarray]:
    """The stored fields of B vectors (float32)."""
    if code == "float16":
        limit = float(np.finfo(np.float16).max)
        return {"value": np.clip(features_BD, -limit, limit).astype(np.float16)}
    scale_B = np.abs(features_BD).max(axis=1)
    unit = features_BD / np.maximum(scale_B, 1e-30)[:, None]
    return {
        "code": np.rint(np.cbrt(unit) * _LEVELS).astype(np.int8),
        "scale": scale_B.astype(np.float32),
    }


def decode(code: Code, stored: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 (..., D)."""
    if code == "float16":
        return stored["value"].astype(np.float32)
    unit = stored["code"].astype(np.float32) / _LEVELS
    return unit**3 * stored["scale"].astype(np.float32)[..., None]


def error_bound(code: Code) -> float:
    """Largest error of a value, as a fraction of the largest value of its vector.

    float16 has a relative rounding error of 2^-11. int8 rounds the cube root u by up to 1/254,
    which changes u^3 by at most 3 u^2 / 254: 3/254 at the largest value.
    """
    if code == "float16":
        return 2.0**-11
    half_step = 0.5 / _LEVELS
    return 1.0 - (1.0 - half_step) ** 3 + 1e-6
