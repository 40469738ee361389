"""Contact sheets and analyses as HTML pages."""

from __future__ import annotations

import math
from html import escape

from fkdpipe.inspect import plots, sheet
from fkdpipe.inspect.html import figures, page, picture, table
from fkdpipe.inspect.plots import band_rows
from fkdpipe.inspect.results import Analysis, SourceAnalysis
from fkdpipe.inspect.views import CropView, ImageView, LabelView, Views


def sheet_page(views: Views, *, title: str, lead: str) -> str:
    """A contact sheet as a page."""
    legend = (
        f'<p><span class="key-mark" style="background:{sheet.TRUTH}"></span>the image\'s class '
        f'&ensp;<span class="key-mark" style="background:{sheet.OTHER}"></span>other classes '
        '&ensp;<span class="right">✓</span> first choice is the image\'s class '
        '&ensp;<span class="wrong">✗</span> it is not &ensp;⇄ mirrored &ensp;◐ colours changed</p>'
    )
    cards = "\n".join(_card(view) for view in views.images)
    notes = [f"<p>left out: {escape(why)}</p>" for why in views.left_out]
    return page(title, lead, [legend, f'<div class="grid">{cards}</div>', *notes])


def _card(view: ImageView) -> str:
    whole = picture(sheet.to_png(sheet.with_boxes(view)), view.key)
    crops = "".join(
        _crop(crop, sheet.BOXES[place % len(sheet.BOXES)]) for place, crop in enumerate(view.crops)
    )
    name = escape(view.class_name or "no class")
    return (
        f'<div class="card"><div class="key">{escape(view.key)}</div>'
        f'<div><strong>{name}</strong><br>{whole}<div class="facts">{view.size[1]} x '
        f"{view.size[0]} pixels</div></div>{crops}</div>"
    )


def _crop(crop: CropView, colour: str) -> str:
    image = picture(sheet.to_png(crop.pixels), f"crop {crop.index}", f"border-color:{colour}")
    labels = "".join(_label(label, named=len(crop.labels) > 1) for label in crop.labels)
    return f'<div class="crop"><div class="facts">{sheet.facts_of(crop)}</div>{image}{labels}</div>'


def _label(label: LabelView, *, named: bool) -> str:
    sign = {
        True: '<span class="right">✓</span> ',
        False: '<span class="wrong">✗</span> ',
        None: "",
    }[label.agrees]
    source = f"{escape(label.source)}: " if named else ""
    lines = [f'<div class="facts">{sign}{source}entropy {label.entropy:.2f}</div>']
    rows = [(b.name, b.probability, sheet.TRUTH if b.truth else sheet.OTHER) for b in label.bars]
    for name, probability, colour in [*rows, ("all others", label.rest, sheet.FAINT)]:
        kind = ' class="truth"' if colour == sheet.TRUTH else ""
        style = f"width:{100 * probability:.1f}%;background:{colour}"
        lines.append(
            f'<div class="bar" title="{escape(name)}"><i{kind} style="{style}"></i>'
            f"<span>{escape(name)}</span>"
            f"<b>{escape(sheet.percent(probability))}</b></div>"
        )
    return "".join(lines)


def analysis_page(a: Analysis) -> str:
    """Tables and plots of an analysis."""
    parts = [table(*summary(a)), figures(plots.analysis_panels(a))]
    parts += ["<h2>Cross-entropy distances</h2>", _distance_words(), table(*distance_table(a))]
    for source in a.sources:
        parts += _source_tables(source)
    if a.classes:
        rows = class_rows(a)
        parts += ["<h2>Classes, least agreement first</h2>", table(CLASS_COLUMNS, rows)]
        parts += ["<h2>Cross-entropy distances by class</h2>", table(*class_distances(a))]
    lead = f"{a.images:,} images, {a.crops:,} crops, {len(a.class_names):,} classes."
    return page(f"Labels of {a.url}", lead, parts)


def _distance_words() -> str:
    return (
        "<p>Row a, column b: the mean of -Σ b log a in nats. Probabilities below 2<sup>-22</sup> "
        "count as that.</p>"
    )


def _source_tables(source: SourceAnalysis) -> list[str]:
    made = []
    columns = ["", "crops", "confidence %", "agreement %"]
    if any(band.crops for band in source.by_confidence):
        made += [f"<h2>{escape(source.name)}: reliability by confidence</h2>"]
        made += [table(columns, band_rows(source.by_confidence))]
        made += [f"<h2>{escape(source.name)}: by the crop's share of the image</h2>"]
        made += [table(columns, band_rows(source.by_area))]
    if source.changes:
        made += [f"<h2>{escape(source.name)}: what each target does to the label</h2>"]
        made += [table(["target", "total variation", "KL (nats)"], change_rows(source))]
    return made


CLASS_COLUMNS = ("class", "crops", "agreement %", "largest prob.", "entropy", "background %")


def summary(a: Analysis) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the first table: one column a source."""
    lines: list[tuple[str, list[str]]] = [
        ("form", [s.form for s in a.sources]),
        ("entropy, mean (nats)", [number(s.entropy) for s in a.sources]),
        ("largest probability, mean", [number(s.top1) for s in a.sources]),
        ("first choice below 50 %", [share(s.unsure) for s in a.sources]),
    ]
    if a.classes:
        lines += [
            ("agreement with ground truth", [share(s.agreement) for s in a.sources]),
            ("calibration error", [share(s.calibration_error) for s in a.sources]),
            ("sure of another class", [share(s.elsewhere) for s in a.sources]),
            ("probably background", [share(s.background) for s in a.sources]),
        ]
    for k in sorted({k for s in a.sources for k in s.kept}):
        cells = [share(s.kept[k][0]) if k in s.kept else "" for s in a.sources]
        lines.append((f"kept by K = {k}, mean", cells))
    return ["", *(s.name for s in a.sources)], [[name, *cells] for name, cells in lines]


def distance_table(a: Analysis) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the distances; only kinds that can be a guess have a row."""
    rows = [
        [f"{a.kinds[g]} →", *(number(value) for value in a.distance_AA[g])]
        for g in range(2, len(a.kinds))
    ]
    return ["", *a.kinds], rows


def class_distances(a: Analysis) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the distances that the plot shows, of every class."""
    columns = [f"{a.kinds[guess]} → {a.kinds[target]}" for guess, target in plots.pairs(a)]
    rows = [
        [name, *(number(distance_AA[pair]) for pair in plots.pairs(a))]
        for name, distance_AA in a.distances_by_class().items()
    ]
    return ["class", *columns], rows


def class_rows(a: Analysis, count: int | None = None) -> list[list[str]]:
    """Classes, least agreement first."""
    ranked = sorted(a.classes, key=lambda c: c.agreement)[:count]
    return [
        [
            c.name,
            f"{c.crops:,}",
            f"{100 * c.agreement:.1f}",
            f"{c.top1:.3f}",
            f"{c.entropy:.3f}",
            f"{100 * c.background:.1f}",
        ]
        for c in ranked
    ]


def change_rows(source: SourceAnalysis) -> list[list[str]]:
    """Targets with what they do to the stored label."""
    return [
        [name, f"{change.total_variation:.4f}", number(change.divergence)]
        for name, change in source.changes.items()
    ]


def number(value: float) -> str:
    """Three digits; an empty cell where a number is not defined."""
    if math.isnan(value):
        return ""
    return "∞" if math.isinf(value) else f"{value:.3f}"


def share(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f} %"
