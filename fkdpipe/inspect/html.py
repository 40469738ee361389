"""HTML pages from `templates/`: one file with embedded pictures and without scripts."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fkdpipe.inspect import plots
from fkdpipe.inspect.plots import Panel

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # columns and rows of text


@dataclass(frozen=True)
class Section:
    """A section of a page; empty parts are omitted."""

    heading: str = ""
    text: str = ""
    table: Table | None = None
    panels: Sequence[Panel] = ()


def render(template: str, **values: Any) -> str:
    """Render a template; all values are escaped."""
    return _environment().get_template(template).render(**values)


def sections_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A page of tables and plots."""
    return render("sections.html", title=title, lead=lead, sections=sections)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fkdpipe.inspect"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["png"] = lambda panel: plots.to_png(plots.figure(panel))
    return environment
