"""Plot a basis: how alignment and transformation change the channels' standard deviations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fkdpipe.networks import features
from fkdpipe.networks.features import Basis

# Standard deviation of PTS of standard normal values at T = 1 and n = 3; see `features.pts`.
_PTS_CONSTANT = 0.89576


def plot(basis: Basis, file: Path, components: int) -> None:
    """Plot standard deviations by rank before and after, and the explained variance.

    The name of the file decides its format: PNG, PDF or SVG.

    Raises:
        UsageError: the basis has fewer components.
    """
    from matplotlib.figure import Figure

    ratios = features.std_ratios(basis, components)
    kept = basis.std_K[:components]
    curves = {
        "raw": np.sort(basis.channel_std_D)[::-1],
        "svd": kept,
        "pts": _PTS_CONSTANT * (kept / 0.1) ** (1 / 3),
        "sn": np.ones(components),
        "sm": features.target_std(basis, components),
    }
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        left.plot(1 + np.arange(len(curve)), curve, label=f"{name}, Std Ratio {ratios[name]:.1f}")
    left.set(xscale="log", yscale="log", xlabel="channel, by rank", ylabel="standard deviation")
    left.legend()
    right.plot(1 + np.arange(len(basis.explained_K)), 100 * basis.explained_K)
    right.axvline(components, linestyle=":", color="gray")
    right.set(xscale="log", xlabel="leading components", ylabel="variance explained, percent")
    right.grid(alpha=0.3)
    figure.suptitle(
        f"{basis.facts['teacher']['name']}, {basis.facts['tap']}, {basis.count:,} crops"
    )
    figure.savefig(file, dpi=150)
