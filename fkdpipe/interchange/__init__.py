"""Label files of other systems, read into stores and written from them; one module a format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fkdpipe.errors import UsageError
from fkdpipe.images import ImageFolder
from fkdpipe.interchange import fkd, mldr, parquet, relabel, sre2l, tinyvit
from fkdpipe.interchange.exporting import Exported
from fkdpipe.interchange.source import ImportSettings, LabelSource

IMPORTS: dict[str, Callable[[Path, ImageFolder, ImportSettings], LabelSource]] = {
    "fkd": fkd.open_labels,
    "ml-dr": mldr.open_labels,
    "tinyvit": tinyvit.open_labels,
    "relabel": relabel.open_relabel,
    "tokenlabeling": relabel.open_tokenlabeling,
    "sre2l": sre2l.open_labels,
}

EXPORTS: dict[str, Callable[..., Exported]] = {
    "fkd": fkd.write_labels,
    "ml-dr": mldr.write_labels,
    "tinyvit": tinyvit.write_labels,
    "parquet": parquet.write_labels,
}


def choose(table: dict, name: str) -> Callable:
    """An entry of one of the tables; raises UsageError naming the formats there are."""
    if name not in table:
        raise UsageError(f"{name!r} is no format known here; take {', '.join(table)}.")
    return table[name]
