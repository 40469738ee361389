"""Pieces of HTML pages: one file, its pictures inside, no script and no server."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from fkdpipe.inspect import plots
from fkdpipe.inspect.plots import Panel

STYLE = """
body { font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; color: #1b1f24; background: #fff;
       margin: 24px auto; max-width: 1280px; padding: 0 16px; }
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
.bar i.truth { min-width: 4px; }
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
