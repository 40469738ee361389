"""Contact sheets and analyses as HTML: one file, its pictures inside, no script and no server."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape

from fkdpipe.inspect import plots, sheet
from fkdpipe.inspect.plots import Panel, band_rows
from fkdpipe.inspect.results import Analysis, SourceAnalysis
from fkdpipe.inspect.views import CropView, ImageView, LabelView, Views

STYLE = """
body { font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; color: #1b1f24; background: #fff;
       margin: 24px auto; max-width: 1180px; padding: 0 16px; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 28px 0 4px; }
p, figcaption { color: #5b6570; margin: 2px 0 10px; max-width: 76ch; }
.grid { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }
figure { margin: 0; flex: 1 1 500px; } figure.wide { flex-basis: 100%; }
figure img { max-width: 100%; }
table { border-collapse: collapse; margin: 6px 0 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px 3px 0; text-align: right; border-bottom: 1px solid #e4e8ec; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
th { color: #5b6570; font-weight: 600; }
.card { border-top: 1px solid #e4e8ec; padding-top: 6px;
        display: flex; flex-wrap: wrap; gap: 12px; }
.card .key { flex-basis: 100%; color: #5b6570; font-size: 12px; overflow-wrap: anywhere; }
.crop { width: 160px; } .crop img { display: block; box-sizing: border-box; border: 3px solid; }
.facts { color: #5b6570; font-size: 12px; }
.bar { position: relative; background: #f6f7f9; height: 17px; margin-top: 2px; font-size: 11px; }
.bar span { position: absolute; top: 0; left: 4px; right: 44px; overflow: hidden;
            white-space: nowrap; text-overflow: ellipsis; }
.bar b { position: absolute; top: 0; right: 3px; font-weight: 400; }
.bar i { position: absolute; inset: 0 auto 0 0; }
.right { color: #1a7f37; font-weight: 700; } .wrong { color: #c62f3b; font-weight: 700; }
.key-mark { display: inline-block; width: 12px; height: 12px; margin: 0 5px -1px 0; }
"""


def page(title: str, lead: str, body: Sequence[str]) -> str:
    """A whole page; `body` is HTML, title and lead are text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text cells; the first column is words, the others are numbers."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table>"


def picture(png: bytes, words: str, style: str = "") -> str:
    """An image inside the page."""
    data = base64.b64encode(png).decode()
    extra = f' style="{escape(style)}"' if style else ""
    return f'<img src="data:image/png;base64,{data}" alt="{escape(words)}"{extra}>'


def figures(panels: Sequence[Panel]) -> str:
    """Every panel with its title and caption."""
    made = []
    for panel in panels:
        kind = ' class="wide"' if panel.wide else ""
        image = picture(plots.to_png(plots.figure(panel)), panel.title)
        made.append(
            f"<figure{kind}><h2>{escape(panel.title)}</h2>{image}"
            f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
        )
    return f'<div class="grid">{"".join(made)}</div>'


def sheet_page(views: Views, *, title: str, lead: str) -> str:
    """A contact sheet as a page."""
    legend = (
        f'<p><span class="key-mark" style="background:{sheet.TRUTH}"></span>the image\'s class '
        f'&ensp;<span class="key-mark" style="background:{sheet.OTHER}"></span>other classes '
        '&ensp;<span class="right">✓</span> first choice is the image\'s class '
        '&ensp;<span class="wrong">✗</span> it is not &ensp;⇄ mirrored</p>'
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
    height, width = crop.box[2:]
    words = f"crop {crop.index} &ensp; {width} x {height}{' &ensp; ⇄' if crop.flip else ''}"
    image = picture(sheet.to_png(crop.pixels), f"crop {crop.index}", f"border-color:{colour}")
    labels = "".join(_label(label, named=len(crop.labels) > 1) for label in crop.labels)
    return f'<div class="crop"><div class="facts">{words}</div>{image}{labels}</div>'


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
        lines.append(
            f'<div class="bar" title="{escape(name)}"><i style="width:{100 * probability:.1f}%;'
            f'background:{colour}"></i><span>{escape(name)}</span>'
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
    lead = f"{a.images:,} images, {a.crops:,} crops, {len(a.class_names):,} classes."
    return page(f"Labels of {a.url}", lead, parts)


def _distance_words() -> str:
    return (
        "<p>Row a, column b: the mean of -Σ b log a in nats. Probabilities below 2<sup>-24</sup> "
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
