"""The order of torchvision's ImageFolder, which several systems use to name their labels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from urllib.parse import unquote_to_bytes

import numpy as np

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def index_of(keys: Sequence[str], rejected: Iterable[str] = ()) -> np.ndarray:
    """int64 (N,): each image's index in torchvision's ImageFolder, -1 where it is not listed.

    ImageFolder sorts by class, folder and name, and selects files only by their extension, so
    broken images count too.

    Args:
        rejected: keys of files that were left out when the folder was scanned.
    """
    known = len(keys)
    everything = [*keys, *rejected]
    names = [_plain(key) for key in everything]
    listed = [
        i for i, name in enumerate(names) if "/" in name and name.lower().endswith(_EXTENSIONS)
    ]
    listed.sort(key=lambda i: (names[i].split("/", 1)[0], *os.path.split(names[i])))
    index = np.full(len(everything), -1, dtype=np.int64)
    index[listed] = np.arange(len(listed))
    return index[:known]


def _plain(key: str) -> str:
    """A key as the operating system's text."""
    return os.fsdecode(unquote_to_bytes(key)) if "%" in key else key
