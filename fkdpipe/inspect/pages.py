"""Contact sheets and analyses as HTML pages."""

from __future__ import annotations

import math

from fkdpipe.inspect import plots, sheet
from fkdpipe.inspect.html import Section, Table, render, sections_page
from fkdpipe.inspect.plots import band_rows
from fkdpipe.inspect.results import Analysis, SourceAnalysis
from fkdpipe.inspect.views import Views


def sheet_page(views: Views, *, title: str, lead: str) -> str:
    """A contact sheet as a page."""
    return render("sheet.html", title=title, lead=lead, views=views, sheet=sheet)


def analysis_page(a: Analysis) -> str:
    """Tables and plots of an analysis."""
    sections = [
        Section(table=summary(a), panels=plots.analysis_panels(a)),
        Section("Cross-entropy distances", DISTANCE_WORDS, distance_table(a)),
    ]
    for source in a.sources:
        sections += [Section(f"{source.name}: {title}", table=t) for title, t in _tables(source)]
    if a.classes:
        sections += [
            Section("Classes, least agreement first", table=(CLASS_COLUMNS, class_rows(a))),
            Section("Cross-entropy distances by class", table=class_distances(a)),
        ]
    lead = f"{a.images:,} images, {a.crops:,} crops, {len(a.class_names):,} classes."
    return sections_page(f"Labels of {a.url}", lead, sections)


DISTANCE_WORDS = (
    "Row a, column b: the mean of -Σ b log a in nats. Probabilities are clamped to 2⁻²²."
)


def _tables(source: SourceAnalysis) -> list[tuple[str, Table]]:
    tables: list[tuple[str, Table]] = []
    columns = ["", "crops", "confidence %", "agreement %"]
    if any(band.crops for band in source.by_confidence):
        by_area = "by relative size of the crop"
        tables.append(("reliability by confidence", (columns, band_rows(source.by_confidence))))
        tables.append((by_area, (columns, band_rows(source.by_area))))
    if source.changes:
        columns = ["target", "total variation", "KL (nats)"]
        tables.append(("effect of each target on the label", (columns, change_rows(source))))
    return tables


CLASS_COLUMNS = ("class", "crops", "agreement %", "largest prob.", "entropy", "background %")


def summary(a: Analysis) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the summary table, one column per source."""
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
            ("confident in another class", [share(s.elsewhere) for s in a.sources]),
            ("probably background", [share(s.background) for s in a.sources]),
        ]
    for k in sorted({k for s in a.sources for k in s.kept}):
        cells = [share(s.kept[k][0]) if k in s.kept else "" for s in a.sources]
        lines.append((f"kept by K = {k}, mean", cells))
    return ["", *(s.name for s in a.sources)], [[name, *cells] for name, cells in lines]


def distance_table(a: Analysis) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the distances; one-hot and hard have no row."""
    rows = [
        [f"{a.kinds[g]} →", *(number(value) for value in a.distance_AA[g])]
        for g in range(2, len(a.kinds))
    ]
    return ["", *a.kinds], rows


def class_distances(a: Analysis) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the plotted distances, for every class."""
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
    """Targets and their effect on the stored label."""
    return [
        [name, f"{change.total_variation:.4f}", number(change.divergence)]
        for name, change in source.changes.items()
    ]


def number(value: float) -> str:
    """Three decimals; empty for NaN."""
    if math.isnan(value):
        return ""
    return "∞" if math.isinf(value) else f"{value:.3f}"


def share(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f} %"
