"""Teacher features made to fit a student: their width aligned, their deviations evened out.

KDEP ("Knowledge Distillation as Efficient Pre-training", He et al.) projects a teacher's
penultimate features, before its last ReLU, onto their leading principal components, and evens out
their very different deviations with Power Temperature Scaling. The other alignments and
transformations of its tables are here too.

Letters: N vectors, D_t teacher width, K components kept, D_s student width, B batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from fkdpipe.common import disk
from fkdpipe.common.errors import ModelError, UsageError

FeatureLayer = Literal["pre", "post"]
StoredLayer = Literal[
    "pre", "post", "map"
]  # what a store keeps: penultimate vectors, or the last map

_RESOLUTION = 1e-6  # deviations smaller than this share of the largest are float32 noise
_METADATA = "fkdpipe-basis"


@dataclass(frozen=True)
class Basis:
    """Principal components of a teacher's features ("SVD" in the paper: centred, so PCA).

    Attributes:
        mean_D: float64 (D_t,). components_DK: float64 (D_t, K), orthonormal columns by falling
            deviation; the entry of largest magnitude of each column is positive.
        std_K: deviation of the features along each component (S / sqrt(N - 1)).
        channel_std_D: deviation of each raw channel.
        count: N.
        facts: what it was fitted on: the teacher's weights and preprocessing, layer, crop
            distribution, seed.
    """

    mean_D: np.ndarray
    components_DK: np.ndarray
    std_K: np.ndarray
    channel_std_D: np.ndarray
    count: int
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 (hex) of the numbers that a projection depends on."""
        return hashlib.sha256(self.mean_D.tobytes() + self.components_DK.tobytes()).hexdigest()

    @property
    def explained_K(self) -> np.ndarray:
        """Share of the total variance that the first k components hold, k = 1, 2, ..."""
        variance = self.std_K**2
        return np.cumsum(variance) / (self.channel_std_D**2).sum()

    @property
    def rank(self) -> int:
        """How many components have a direction of their own; the others are arbitrary."""
        return int((self.std_K > _RESOLUTION * self.std_K[0]).sum())

    def check_components(self, components: int) -> None:
        """Raises UsageError when that many leading components are not there, or arbitrary."""
        if components > self.rank:
            raise UsageError(
                f"the basis has {self.rank} components, fitted on {self.count} vectors of width "
                f"{len(self.mean_D)}; {components} are asked for. Fit it on more images, or take "
                "fewer."
            )

    def project(self, features_BD: torch.Tensor, components: int) -> torch.Tensor:
        """float32 (B, components): coordinates along the leading components.

        Raises:
            UsageError: more components than the basis has.
        """
        self.check_components(components)
        device = features_BD.device
        mean = torch.from_numpy(self.mean_D).to(device, torch.float32)
        axes = torch.from_numpy(self.components_DK[:, :components]).to(device, torch.float32)
        with torch.autocast(device.type, enabled=False):
            return (features_BD.float() - mean) @ axes

    def check_teacher(self, facts: dict[str, Any]) -> None:
        """Refuse another teacher, or the same with another preprocessing.

        Args:
            facts: of `fkdpipe.networks.teachers.Teacher.facts`.

        Raises:
            ModelError: naming what differs.
        """
        own = self.facts["teacher"]
        differs = teachers_differ(own, facts)
        if differs:
            raise ModelError(
                f"the basis was fitted on {own['name']} with other {', '.join(differs)}. Fit one "
                "for this teacher with fkdpipe fit-basis.",
                code="other-teacher",
            )


def fit(
    count: int,
    sum_D: np.ndarray,
    product_DD: np.ndarray,
    facts: dict[str, Any],
) -> Basis:
    """The basis of N vectors known by their sums, in float64.

    Args:
        sum_D: sum of the vectors. product_DD: sum of their outer products.

    Raises:
        UsageError: fewer than two vectors.
    """
    if count < 2:
        raise UsageError(f"a basis needs at least two feature vectors; found {count}.")
    mean = sum_D / count
    scatter = product_DD - count * np.outer(mean, mean)
    scatter = (scatter + scatter.T) / 2
    values, vectors = np.linalg.eigh(scatter)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
    return Basis(
        mean_D=mean,
        components_DK=np.ascontiguousarray(vectors * np.where(signs == 0, 1.0, signs)),
        std_K=np.sqrt(values / (count - 1)),
        channel_std_D=np.sqrt(np.maximum(np.diag(scatter), 0.0) / (count - 1)),
        count=count,
        facts=facts,
    )


def teachers_differ(own: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what makes features of two teachers (`teachers.Teacher.facts`) different ones."""
    names = ("name", "library", "weights", "size", "interpolation", "mean", "std")
    return [name for name in names if own[name] != other[name]]


def save_basis(file: Path, basis: Basis) -> None:
    """As safetensors, facts in the header; complete or absent."""
    arrays = {
        "mean": basis.mean_D,
        "components": basis.components_DK,
        "std": basis.std_K,
        "channel_std": basis.channel_std_D,
    }
    header = json.dumps({"count": basis.count, "facts": basis.facts}, sort_keys=True)
    partial = file.with_name(f"{file.name}.partial")
    values = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    try:
        with disk.writing(file):
            save_file(values, partial, metadata={_METADATA: header})
            os.replace(partial, file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def load_basis(file: Path) -> Basis:
    """Raises ModelError when the file is missing, broken or no basis."""
    try:
        with safe_open(file, "np") as opened:
            header = json.loads((opened.metadata() or {})[_METADATA])
        arrays = load_file(file)
        return Basis(
            mean_D=arrays["mean"],
            components_DK=arrays["components"],
            std_K=arrays["std"],
            channel_std_D=arrays["channel_std"],
            count=int(header["count"]),
            facts=header["facts"],
        )
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ModelError(f"{file} is not a basis made by fkdpipe fit-basis ({error}).") from error


def parse_features(text: str) -> tuple[StoredLayer, int | None]:
    """`pre`, `post`, `map`, `pre:512`: which features, and how many leading components of a basis.

    Raises:
        UsageError: anything else.
    """
    layer, _, dims = text.partition(":")
    if text == "map":
        return "map", None
    if layer == "map":
        raise UsageError(f"{text!r}: a map is kept whole, and a basis is of vectors; take map.")
    if layer in get_args(FeatureLayer) and (not dims or (dims.isdigit() and int(dims) > 0)):
        return layer, int(dims) if dims else None  # type: ignore[return-value]
    raise UsageError(
        f"{text!r} names no features; take pre or post (before or after the last activation), "
        "with :D for the leading D components of a basis, for example pre:512, or map (the last "
        "map after the final norm)."
    )


def leading_channels(channel_std_D: np.ndarray, width: int) -> np.ndarray:
    """int64 (width,): the channels of largest deviation, largest first (KDEP's CS.var)."""
    _check_width(len(channel_std_D), width)
    return np.argsort(-channel_std_D, kind="stable")[:width]


def random_channels(channels: int, width: int, seed: int) -> np.ndarray:
    """int64 (width,): distinct channels at random, rising (KDEP's CS.rand)."""
    _check_width(channels, width)
    return np.sort(np.random.default_rng(seed).choice(channels, width, replace=False))


def interpolate(features_BD: torch.Tensor, width: int) -> torch.Tensor:
    """float32 (B, width): nearest interpolation along the channels."""
    return functional.interpolate(features_BD.float()[:, None], size=width, mode="nearest")[:, 0]


def _check_width(channels: int, width: int) -> None:
    if width > channels:
        raise UsageError(f"{width} channels cannot be chosen from {channels}.")


def pts(features: torch.Tensor, temperature: float = 0.1, power: float = 3.0) -> torch.Tensor:
    """float32: sign(f) |f / T|^(1/n), Power Temperature Scaling.

    Of normal values of deviation s it has deviation c(n) (s / T)^(1/n) with c(3) = 0.89576: a
    ratio r of two deviations becomes r^(1/n).

    Reference:
        He et al., "Knowledge Distillation as Efficient Pre-training", equation 2.
    """
    with torch.autocast(features.device.type, enabled=False):
        f = features.float()
        return f.sign() * (f.abs() / temperature).pow(1 / power)


def scale_normalise(features_BK: torch.Tensor, std_K: torch.Tensor) -> torch.Tensor:
    """float32 (B, K): each channel over its own deviation (SN)."""
    return features_BK.float() / std_K


def std_match(
    features_BK: torch.Tensor, std_K: torch.Tensor, target_std_K: torch.Tensor
) -> torch.Tensor:
    """float32 (B, K): each channel given another deviation (SM; see `target_std`)."""
    return features_BK.float() / std_K * target_std_K


def target_std(basis: Basis, width: int) -> np.ndarray:
    """float64 (width,): Std Matching's deviations, the raw channels' largest, falling."""
    return basis.channel_std_D[leading_channels(basis.channel_std_D, width)]


def std_ratio(std_D: np.ndarray) -> float:
    """Largest over smallest deviation; dead channels, whose deviation is zero, do not count."""
    alive = std_D[std_D > _RESOLUTION * std_D.max()]
    return float(alive.max() / alive.min())


def std_ratios(basis: Basis, width: int, *, power: float = 3.0) -> dict[str, float]:
    """The Std Ratio of the raw channels, of `width` components, and after each transformation.

    From the basis alone: PTS by its law for normal values, r^(1/n), whatever T is.
    """
    basis.check_components(width)
    svd = std_ratio(basis.std_K[:width])
    return {
        "raw": std_ratio(basis.channel_std_D),
        "svd": svd,
        "pts": svd ** (1 / power),
        "sn": 1.0,
        "sm": std_ratio(target_std(basis, width)),
    }
