"""Label files of other systems, read into stores and written from them; one module a format."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from fkdpipe.common.errors import FkdpipeError, LabelsError, UsageError
from fkdpipe.interchange import fkd, mldr, parquet, relabel, sre2l, tinyvit
from fkdpipe.interchange.exporting import Exported
from fkdpipe.interchange.source import DAMAGE, ImportSettings, LabelSource
from fkdpipe.pixels.images import ImageFolder

log = logging.getLogger(__name__)

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

# Settings that only some formats know; the others are for all.
_ONLY = {
    "classes": tuple(name for name in IMPORTS if name != "sre2l"),  # which keeps all scores
    "keep": ("relabel", "tokenlabeling"),
    "compat_transposed": ("relabel", "tokenlabeling"),
    "skip_transformed": ("ml-dr",),
    "assume_plain": ("tinyvit",),
    "sampler_seed": ("sre2l",),
}


def check_settings(name: str, given: Iterable[str]) -> None:
    """Refuse settings that mean nothing for a format.

    Args:
        given: names of the `ImportSettings` a user chose.

    Raises:
        UsageError: naming the setting and the formats it is for.
    """
    for setting in given:
        if name not in _ONLY.get(setting, (name,)):
            option = setting.replace("_", "-")
            known = ", ".join(_ONLY[setting])
            raise UsageError(f"--{option} means nothing for {name}; it is for {known}.")


def open_labels(
    name: str, place: Path, folder: ImageFolder, settings: ImportSettings
) -> LabelSource:
    """Label files of a format, opened.

    Raises:
        LabelsError: they cannot be used, or are not what the format says.
        UsageError: an unknown format, or settings that do not fit.
    """
    log.info("matching label files with %s images", f"{len(folder):,}")
    try:
        return choose(IMPORTS, name)(place, folder, settings)
    except FkdpipeError:
        raise
    except (OSError, *DAMAGE) as error:
        raise LabelsError(
            f"{place} is not as {name} writes it ({type(error).__name__}: {error}).",
            code="broken-labels",
        ) from error


def choose(table: dict, name: str) -> Callable:
    """An entry of one of the tables; raises UsageError naming the formats there are."""
    if name not in table:
        raise UsageError(f"{name!r} is no format known here; take {', '.join(table)}.")
    return table[name]
