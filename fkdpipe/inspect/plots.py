"""Figures of an analysis and of storage reports, drawn without a display.

A panel has a title, a caption and a function that draws on axes, so that pages can show each panel
alone and a picture can show all together.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fkdpipe.inspect.results import Analysis, Band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b5fa5", "#d1701c", "#2b8a4b", "#a03a7d", "#6b6f76", "#b8960c", "#3a9ea5", "#8c4a2f")
FIRST_CLASSES = 50  # as in figure 3 of the FKD paper
PAIRS = 8


@dataclass(frozen=True)
class Panel:
    """One plot. wide: takes a whole row. height: in inches."""

    title: str
    caption: str
    draw: Callable[[Axes], None]
    wide: bool = False
    height: float = 3.6


def analysis_panels(a: Analysis) -> list[Panel]:
    """Plots of an analysis; some need ground truth."""
    panels = [
        Panel(
            "Entropy of the labels",
            "Zero is a one-hot label; the dotted line, ln C, is a uniform one. Probabilities that "
            "are not stored are spread evenly.",
            lambda axes: _entropy(axes, a),
        ),
        Panel(
            "Largest probability",
            "The teacher's confidence.",
            lambda axes: _top1(axes, a),
        ),
        Panel(
            "Probability of the K most probable classes",
            "Mean over crops; the dashed line is the 10th percentile.",
            lambda axes: _kept(axes, a),
        ),
    ]
    if a.classes:
        panels += [
            Panel(
                "Reliability",
                "Agreement by confidence. On the diagonal, 80 % of the crops with a confidence of "
                "80 % agree with the image's class.",
                lambda axes: _reliability(axes, a),
            ),
            Panel(
                "Agreement by size of the crop",
                "Small crops often show background or a part. Labels are calibrated where the "
                "dashed line (confidence) follows the solid one (agreement).",
                lambda axes: _areas(axes, a),
            ),
        ]
    if any(source.changes for source in a.sources):
        panels.append(
            Panel(
                "Effect of each target on the label",
                "Total variation from the stored label: 0 is identical, 1 is disjoint.",
                lambda axes: _changes(axes, a),
            )
        )
    if a.classes:
        panels += [
            Panel(
                "Cross-entropy distances by class",
                "a → b is the mean of -Σ b log a over the crops of a class (FKD, equation 2 and "
                f"figure 3); the first {FIRST_CLASSES} classes.",
                lambda axes: _distances(axes, a),
                wide=True,
            ),
            Panel(
                "Agreement with the ground truth by class",
                "Classes sorted by agreement; the table names the lowest.",
                lambda axes: _agreement(axes, a),
                wide=True,
            ),
        ]
    return panels


def figure(panel: Panel) -> Figure:
    """A figure with one panel."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11.6 if panel.wide else 5.6, panel.height), layout="constrained")
    panel.draw(picture.add_subplot())
    return picture


def together(panels: Sequence[Panel], title: str) -> Figure:
    """A figure with all panels, two per row."""
    from matplotlib.figure import Figure

    rows: list[list[Panel]] = []
    for panel in panels:
        if panel.wide or not rows or len(rows[-1]) == 2 or rows[-1][0].wide:
            rows.append([panel])
        else:
            rows[-1].append(panel)
    heights = [max(panel.height for panel in row) for row in rows]
    picture = Figure(figsize=(11.5, sum(heights) + 0.5), layout="constrained")
    picture.suptitle(title, fontsize=12, x=0.01, ha="left")
    grid = picture.add_gridspec(len(rows), 2, height_ratios=heights)
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            axes = picture.add_subplot(grid[number, :] if panel.wide else grid[number, column])
            panel.draw(axes)
            axes.set_title(panel.title, fontsize=11, loc="left")
    return picture


def to_png(picture: Figure, *, dpi: int = 110) -> bytes:
    """The bytes of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(picture)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # missing glyphs are drawn as boxes
        picture.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def tick(name: str) -> str:
    """A class name shortened for an axis, escaped so that matplotlib does not parse it as math."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    short = plain if len(plain) <= 14 else f"{plain[:13]}…"
    return short.replace("$", r"\$")


def _plain(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e8ec", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(frameon=False, fontsize=9, **options)


def _histogram(axes: Axes, counts: Sequence[int], top: float, colour: str, name: str) -> None:
    edges = np.linspace(0, top, len(counts) + 1)
    share = 100 * np.array(counts) / max(sum(counts), 1)
    axes.stairs(share, edges, color=colour, fill=True, alpha=0.25)
    axes.stairs(share, edges, color=colour, linewidth=1.5, label=name)


def _entropy(axes: Axes, a: Analysis) -> None:
    top = math.log(len(a.class_names))
    for source, colour in zip(a.sources, COLOURS, strict=False):
        name = f"{source.name}, mean {source.entropy:.2f}"
        _histogram(axes, source.entropy_histogram, top, colour, name)
    axes.axvline(top, color="#5b6570", linestyle=":", linewidth=1)
    _plain(axes, "entropy (nats)", "share of crops (%)")
    _legend(axes)


def _top1(axes: Axes, a: Analysis) -> None:
    for source, colour in zip(a.sources, COLOURS, strict=False):
        _histogram(
            axes, source.top1_histogram, 1.0, colour, f"{source.name}, mean {source.top1:.2f}"
        )
    _plain(axes, "largest probability", "share of crops (%)")
    _legend(axes, loc="upper left")


def _kept(axes: Axes, a: Analysis) -> None:
    for source, colour in zip(a.sources, COLOURS, strict=False):
        mean, low = np.array(list(source.kept.values())).T * 100
        kept_K = np.array(list(source.kept))
        axes.plot(kept_K, mean, "o-", color=colour, markersize=4, label=source.name)
        axes.plot(kept_K, low, "o--", color=colour, markersize=3, linewidth=1)
    ticks = sorted({k for source in a.sources for k in source.kept})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_ylim(None, 101)
    _plain(axes, "K", "probability kept (%)")
    _legend(axes, loc="lower right")


def _reliability(axes: Axes, a: Analysis) -> None:
    axes.plot([0, 100], [0, 100], color="#5b6570", linestyle=":", linewidth=1)
    for source, colour in zip(a.sources, COLOURS, strict=False):
        bands = [band for band in source.by_confidence if band.crops]
        name = f"{source.name}, calibration error {100 * source.calibration_error:.1f} %"
        axes.plot(
            [100 * band.confidence for band in bands],
            [100 * band.agreement for band in bands],
            "o-", color=colour, markersize=4, label=name,
        )  # fmt: skip
    _plain(axes, "largest probability (%)", "agreement (%)")
    _legend(axes, loc="upper left")


def _areas(axes: Axes, a: Analysis) -> None:
    for source, colour in zip(a.sources, COLOURS, strict=False):
        bands = [band for band in source.by_area if band.crops]
        middle = [50 * (band.low + band.high) for band in bands]
        axes.plot(
            middle, [100 * band.agreement for band in bands], "o-", color=colour, markersize=4,
            label=source.name,
        )  # fmt: skip
        axes.plot(middle, [100 * band.confidence for band in bands], "--", color=colour)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    _plain(axes, "crop area (% of the image)", "agreement, confidence (%)")
    _legend(axes, loc="upper left", ncols=2)


def _changes(axes: Axes, a: Analysis) -> None:
    sources = [source for source in a.sources if source.changes]
    names = list(sources[0].changes)
    height = 0.8 / len(sources)
    for index, source in enumerate(sources):
        values = [source.changes[name].total_variation for name in names]
        y_positions = np.arange(len(names)) + (index - (len(sources) - 1) / 2) * height
        axes.barh(y_positions, values, height * 0.9, color=COLOURS[index], label=source.name)
        for y, value in zip(y_positions, values, strict=True):
            axes.text(value, y, f" {value:.3f}", va="center", fontsize=8)
    axes.set_yticks(np.arange(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    _plain(axes, "total variation", "")
    if len(sources) > 1:
        _legend(axes)


def pairs(a: Analysis) -> list[tuple[int, int]]:
    """(prediction, target) pairs to plot: each soft kind to one-hot and to the other soft ones."""
    count = len(a.kinds)
    soft = range(2, count)
    pairs = [(g, 0) for g in soft] + [(g, t) for g in soft for t in soft if g != t]
    return (pairs if count > 3 else [*pairs, (2, 2)])[:PAIRS]


def _distances(axes: Axes, a: Analysis) -> None:
    for (guess, target), colour in zip(pairs(a), COLOURS, strict=False):
        value = a.distance_CAA[:FIRST_CLASSES, guess, target]
        name = f"{a.kinds[guess]} → {a.kinds[target]}, mean {a.distance_AA[guess, target]:.2f}"
        axes.plot(value, "o-", color=colour, markersize=3, linewidth=1.2, label=name)
    names = a.class_names[:FIRST_CLASSES]
    if len(names) <= 20:
        short = [tick(name) for name in names]
        rotation = 0 if sum(map(len, short)) < 90 else 35
        axes.set_xticks(
            range(len(short)),
            short,
            rotation=rotation,
            ha="right" if rotation else "center",
            fontsize=8,
        )
    _plain(axes, "class", "cross-entropy (nats)")
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
    _legend(axes, loc="upper left", ncols=3)


def _agreement(axes: Axes, a: Analysis) -> None:
    ranked = sorted(a.classes, key=lambda c: c.agreement)
    share = [100 * c.agreement for c in ranked]
    few = len(ranked) <= 20
    if few:
        axes.bar(range(len(ranked)), share, color=COLOURS[0], width=0.7)
        short = [tick(c.name) for c in ranked]
        rotation = 0 if sum(map(len, short)) < 110 else 35
        axes.set_xticks(
            range(len(ranked)),
            short,
            rotation=rotation,
            ha="right" if rotation else "center",
            fontsize=8,
        )
    else:
        axes.fill_between(range(len(ranked)), share, color=COLOURS[0], alpha=0.3)
        axes.plot(share, color=COLOURS[0])
    mean = 100 * a.sources[0].agreement
    axes.axhline(mean, color="#5b6570", linestyle=":", linewidth=1, label=f"all {mean:.1f} %")
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    _plain(axes, "class", f"agreement of {a.sources[0].name} (%)")
    _legend(axes, loc="upper left")


def band_rows(bands: Sequence[Band]) -> list[list[str]]:
    """Table rows of bands: range, crops, confidence and agreement, in percent."""
    return [
        [
            f"{100 * band.low:.0f} to {100 * band.high:.0f} %",
            f"{band.crops:,}",
            f"{100 * band.confidence:.1f}",
            f"{100 * band.agreement:.1f}",
        ]
        for band in bands
        if band.crops
    ]
