"""Import and export label files of other systems, with one module per format."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from fkdpipe.common import disk
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

# Settings that apply only to some formats; all others apply to every format.
_ONLY = {
    "classes": tuple(name for name in IMPORTS if name != "sre2l"),  # which stores all scores
    "keep": ("relabel", "tokenlabeling"),
    "compat_transposed": ("relabel", "tokenlabeling"),
    "skip_transformed": ("ml-dr",),
    "assume_plain": ("tinyvit",),
    "sampler_seed": ("sre2l",),
}


def check_settings(name: str, settings: Iterable[str]) -> None:
    """Refuse settings that do not apply to a format.

    Args:
        settings: names of the `ImportSettings` that the user set.

    Raises:
        UsageError: names the setting and the formats it applies to.
    """
    for setting in settings:
        if name not in _ONLY.get(setting, (name,)):
            option = setting.replace("_", "-")
            known = ", ".join(_ONLY[setting])
            raise UsageError(f"--{option} does not apply to {name}, only to {known}.")


def open_labels(
    name: str, path: Path, folder: ImageFolder, settings: ImportSettings
) -> LabelSource:
    """Open label files of a format.

    Raises:
        LabelsError: they cannot be used, or are not in this format.
        UsageError: an unknown format, or settings that do not apply to it.
    """
    # All files or none are pointers, so a few are looked at; there may be a million.
    for file in itertools.islice((path, *(path.rglob("*") if path.is_dir() else ())), 32):
        disk.refuse_pointer(file, LabelsError)
    log.info("matching label files with %s images", f"{len(folder):,}")
    try:
        return choose(IMPORTS, name)(path, folder, settings)
    except FkdpipeError:
        raise
    except (OSError, *DAMAGE) as error:
        raise LabelsError(
            f"{path} is not in {name}'s format ({type(error).__name__}: {error}).",
            code="broken-labels",
        ) from error


def choose(table: dict, name: str) -> Callable:
    """An entry of one of the tables; raises UsageError that lists the formats."""
    if name not in table:
        raise UsageError(f"unknown format {name!r}; the formats are {', '.join(table)}.")
    return table[name]
