"""Alignment of teacher features with a student's width, and scaling of their standard deviations.

KDEP ("Knowledge Distillation as Efficient Pre-training", He et al.) projects a teacher's
penultimate features, before its last ReLU, onto their leading principal components, and reduces the
spread of their standard deviations with Power Temperature Scaling. The other alignments and
transformations of its tables are implemented too.

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
StoredLayer = Literal["pre", "post", "map"]  # penultimate vectors, or the last map

_RESOLUTION = 1e-6  # smaller standard deviations, relative to the largest, are float32 noise
_METADATA = "fkdpipe-basis"


@dataclass(frozen=True)
class Basis:
    """Principal components of a teacher's features ("SVD" in the paper: centred, so PCA).

    Attributes:
        mean_D: float64 (D_t,). components_DK: float64 (D_t, K), orthonormal columns in
            order of decreasing standard deviation; the entry of largest magnitude of each column
            is positive.
        std_K: standard deviation along each component (S / sqrt(N - 1)).
        channel_std_D: standard deviation of each channel.
        count: N.
        facts: origin of the basis: the teacher's weights and preprocessing, layer, crop
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
        """SHA-256 (hex) of the arrays that a projection depends on."""
        return hashlib.sha256(self.mean_D.tobytes() + self.components_DK.tobytes()).hexdigest()

    @property
    def explained_K(self) -> np.ndarray:
        """Fraction of the variance explained by the first k components, k = 1, 2, ..."""
        variance = self.std_K**2
        return np.cumsum(variance) / (self.channel_std_D**2).sum()

    @property
    def rank(self) -> int:
        """Number of components with nonzero variance; the others have arbitrary directions."""
        return int((self.std_K > _RESOLUTION * self.std_K[0]).sum())

    def check_components(self, components: int) -> None:
        """Raises UsageError if the basis has fewer components than that."""
        if components <= self.rank:
            return
        if self.rank == self.count - 1:
            remedy = "Fit it on more images, or use fewer components."
        else:
            remedy = (
                f"More images do not help, since the network's features span {self.rank} "
                f"dimensions. Use {self.rank} components or fewer; for a wider student, train on "
                "whole vectors (--features without :D) with --set method.alignment=variance, or "
                "conv-pre, which needs no basis."
            )
        raise UsageError(
            f"the basis has {self.rank} components, fitted on {self.count} vectors of width "
            f"{len(self.mean_D)}; {components} were requested. {remedy}"
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
        """Refuse a different teacher, or the same one with different preprocessing.

        Args:
            facts: from `fkdpipe.networks.teachers.Teacher.facts`.

        Raises:
            ModelError: the teachers differ; the message says in what.
        """
        own = self.facts["teacher"]
        differs = teachers_differ(own, facts)
        if differs:
            raise ModelError(
                f"the basis was fitted on {own['name']} with different {', '.join(differs)}. Fit a "
                "basis for this teacher with fkdpipe fit-basis.",
                code="other-teacher",
            )


def fit(
    count: int,
    sum_D: np.ndarray,
    product_DD: np.ndarray,
    facts: dict[str, Any],
) -> Basis:
    """The basis of N vectors, from their sums, in float64.

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
    """Keys in which two teachers (`teachers.Teacher.facts`) differ."""
    names = ("name", "library", "weights", "size", "interpolation", "mean", "std")
    return [name for name in names if own[name] != other[name]]


def save_basis(file: Path, basis: Basis) -> None:
    """Write a basis atomically, as safetensors with the facts in the header.

    Raises:
        UsageError: `file` is a URL.
    """
    file = disk.local_path(file)
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
    """Raises ModelError if the file is missing, broken or not a basis, UsageError for a URL."""
    file = disk.local_path(file)
    disk.refuse_pointer(file, ModelError)
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
        raise ModelError(
            f"{file} is not a basis written by fkdpipe fit-basis ({error})."
        ) from error


def parse_features(text: str) -> tuple[StoredLayer, int | None]:
    """Parse `pre`, `post`, `map` or `pre:512` into the layer and the number of basis components.

    Raises:
        UsageError: anything else.
    """
    layer, _, dims = text.partition(":")
    if text == "map":
        return "map", None
    if layer == "map":
        raise UsageError(
            f"{text!r}: maps are stored whole, as a basis is only for vectors; use map."
        )
    if layer in get_args(FeatureLayer) and (not dims or (dims.isdigit() and int(dims) > 0)):
        return layer, int(dims) if dims else None  # type: ignore[return-value]
    raise UsageError(
        f"invalid features {text!r}; use pre or post (before or after the last activation), "
        "with :D for the leading D components of a basis, for example pre:512, or map (the last "
        "map after the final norm)."
    )


def leading_channels(channel_std_D: np.ndarray, width: int) -> np.ndarray:
    """int64 (width,): channels of largest standard deviation, in decreasing order (CS.var)."""
    _check_width(len(channel_std_D), width)
    return np.argsort(-channel_std_D, kind="stable")[:width]


def random_channels(channels: int, width: int, seed: int) -> np.ndarray:
    """int64 (width,): distinct random channels, in increasing order (KDEP's CS.rand)."""
    _check_width(channels, width)
    return np.sort(np.random.default_rng(seed).choice(channels, width, replace=False))


def interpolate(features_BD: torch.Tensor, width: int) -> torch.Tensor:
    """float32 (B, width): nearest-neighbour interpolation along the channels."""
    return functional.interpolate(features_BD.float()[:, None], size=width, mode="nearest")[:, 0]


def _check_width(channels: int, width: int) -> None:
    if width > channels:
        raise UsageError(f"{width} channels cannot be chosen from {channels}.")


def pts(features: torch.Tensor, temperature: float = 0.1, power: float = 3.0) -> torch.Tensor:
    """float32: sign(f) |f / T|^(1/n), Power Temperature Scaling.

    Normal values of standard deviation s get standard deviation c(n) (s / T)^(1/n), with
    c(3) = 0.89576, so a ratio r of two standard deviations becomes r^(1/n).

    Reference:
        He et al., "Knowledge Distillation as Efficient Pre-training", equation 2.
    """
    with torch.autocast(features.device.type, enabled=False):
        f = features.float()
        return f.sign() * (f.abs() / temperature).pow(1 / power)


def scale_normalise(features_BK: torch.Tensor, std_K: torch.Tensor) -> torch.Tensor:
    """float32 (B, K): each channel divided by its standard deviation (SN)."""
    return features_BK.float() / std_K


def std_match(
    features_BK: torch.Tensor, std_K: torch.Tensor, target_std_K: torch.Tensor
) -> torch.Tensor:
    """float32 (B, K): each channel rescaled to a target standard deviation (SM)."""
    return features_BK.float() / std_K * target_std_K


def target_std(basis: Basis, width: int) -> np.ndarray:
    """float64 (width,): target of Std Matching, the largest channel stds in decreasing order."""
    return basis.channel_std_D[leading_channels(basis.channel_std_D, width)]


def std_ratio(std_D: np.ndarray) -> float:
    """Largest over smallest standard deviation, without dead channels, whose std is zero."""
    alive = std_D[std_D > _RESOLUTION * std_D.max()]
    return float(alive.max() / alive.min())


def std_ratios(basis: Basis, width: int, *, power: float = 3.0) -> dict[str, float]:
    """The Std Ratio of the raw channels, of `width` components, and after each transformation.

    Computed from the basis alone; for PTS, r^(1/n), which is exact for normal values and any T.
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
