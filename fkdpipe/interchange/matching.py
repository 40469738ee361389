"""Which label file belongs to which image: by folders and name, whatever lies above them.

Names are compared folder by folder, so that the names of a million files are never held in memory
at once. The list of images itself is, which `benchmarks/interchange.py` measures.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from fkdpipe.common.errors import LabelsError
from fkdpipe.interchange.torchfile import BrokenFileError
from fkdpipe.pixels import images
from fkdpipe.pixels.images import ImageFolder

Parsed = TypeVar("Parsed")

MAX_DEPTH = 4  # folders between what the user names and the class folders
SAMPLE = 32
EXAMPLES = 20

_NONE, _AMBIGUOUS, _FIRST = 0, 1, 2  # from _FIRST on: which of `_candidates` is the label's name


@dataclass(frozen=True)
class LabelTree:
    """A tree of label files, matched to an image folder.

    Attributes:
        root: folder below which the images' folders lie again. suffix: of the label files.
        keys: of the images. kind_N: uint8, which name serves.
        extra: label files without an image; examples.
    """

    root: Path
    suffix: str
    keys: Sequence[str]
    kind_N: np.ndarray
    extra: int
    extra_examples: tuple[str, ...]

    def path(self, position: int) -> bytes:
        """The label file of an image.

        Raises:
            BrokenFileError: "no-label", or "ambiguous-label" when several images claim it.
        """
        kind, key = int(self.kind_N[position]), self.keys[position]
        if kind == _AMBIGUOUS:
            raise BrokenFileError("ambiguous-label", "other images have the same label file")
        if kind == _NONE:
            raise BrokenFileError("no-label", f"no label file below {self.root}")
        folder, name = os.path.split(key)
        label = _candidates(name)[kind - _FIRST] + self.suffix
        return images.path_of(self.root, os.path.join(folder, label))

    def read(self, position: int) -> bytes:
        """Its bytes; raises BrokenFileError when it cannot be read."""
        path = self.path(position)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            detail = f"{os.fsdecode(path)}: {error.strerror or error}"
            raise BrokenFileError("no-label", detail) from error

    def sample(self) -> list[int]:
        """Positions of a few images that have a label file, spread over the folder."""
        usable = np.flatnonzero(self.kind_N >= _FIRST)
        return usable[spread(len(usable))].tolist()

    def first(self, parse: Callable[[bytes], Parsed]) -> Parsed:
        """What is in the first file of the sample that can be read.

        Raises:
            LabelsError: none can be.
        """
        reasons = []
        for position in self.sample():
            try:
                return parse(self.read(position))
            except BrokenFileError as error:
                reasons.append(f"{os.fsdecode(self.path(position))}: {error}")
        raise LabelsError(
            f"none of {len(reasons)} label files could be read; for example {reasons[0]}.",
            code="broken-labels",
        )

    def fingerprint(self) -> str:
        """sha256 (hex) over a few label files: enough to tell two label sets apart."""
        digest = hashlib.sha256()
        for position in self.sample():
            digest.update(self.keys[position].encode() + b"\0" + self.read(position))
        return digest.hexdigest()


def spread(count: int) -> np.ndarray:
    """int64: up to `SAMPLE` of `count` positions, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).astype(np.int64))


def stem(name: str) -> str:
    """A file name without its last extension."""
    return name.rsplit(".", 1)[0] if "." in name[1:] else name


def cut(name: str) -> str:
    """A file name up to its first dot, which is how FKD's and ReLabel's tools name labels."""
    return name.split(".", 1)[0]


def cut_name(key: str) -> str:
    """A path whose last part is cut."""
    folder, name = os.path.split(key)
    return os.path.join(folder, cut(name))


def _candidates(name: str) -> tuple[str, str, str]:
    """What an image's label may be called, without the suffix, the surest first."""
    return name, stem(name), cut(name)


def match(place: Path, folder: ImageFolder, suffix: str) -> LabelTree:
    """Find the label files of a folder's images below a place.

    Raises:
        LabelsError: no such place, nothing there fits, or more than half of the images have no
            label file.
    """
    if not place.is_dir():
        raise LabelsError(f"{place}: no such folder of label files.", code="no-labels")
    root = _find_root(place, folder, suffix)
    by_folder: dict[str, list[int]] = {}
    for position, key in enumerate(folder.keys):
        by_folder.setdefault(os.path.dirname(key), []).append(position)
    kind_N = np.zeros(len(folder), dtype=np.uint8)
    extra = 0
    examples: list[str] = []
    for relative, positions in by_folder.items():
        labels = _label_names(root, relative, suffix)
        names = [os.path.basename(folder.keys[p]) for p in positions]
        kinds, unused = _kinds(names, labels)
        kind_N[positions] = kinds
        extra += len(unused)
        examples += [os.path.join(relative, name + suffix) for name in sorted(unused)]
        del examples[EXAMPLES:]
    for path in _elsewhere(root, by_folder, suffix):
        extra += 1
        if len(examples) < EXAMPLES:
            examples.append(path)
    missing = int((kind_N == _NONE).sum())
    if missing > len(folder) / 2:
        lost = [folder.keys[p] for p in np.flatnonzero(kind_N == _NONE)[:3]]
        raise LabelsError(
            f"{missing:,} of {len(folder):,} images have no label file below {root}, for example "
            f"{', '.join(lost)}. Is {place} the right folder, and {folder.root} the images it was "
            "made for?",
            code="wrong-folder",
        )
    return LabelTree(root, suffix, folder.keys, kind_N, extra, tuple(examples))


def _kinds(names: list[str], labels: set[str]) -> tuple[list[int], set[str]]:
    """Which name of a label serves each image of one folder; and labels that serve none."""
    served = [
        next((k for k, label in enumerate(_candidates(name)) if label in labels), None)
        for name in names
    ]
    claimed = [
        None if k is None else _candidates(name)[k] for name, k in zip(names, served, strict=True)
    ]
    counts = Counter(claimed)
    kinds = [
        _NONE if k is None else _AMBIGUOUS if counts[claim] > 1 else _FIRST + k
        for k, claim in zip(served, claimed, strict=True)
    ]
    return kinds, labels - set(filter(None, claimed))


def _label_names(root: Path, relative: str, suffix: str) -> set[str]:
    """Names of label files of one folder, without the suffix."""
    place = images.path_of(root, relative) if relative else os.fsencode(root)
    try:
        entries = [e for e in os.scandir(place) if not e.is_dir(follow_symlinks=False)]
        found = [os.fsdecode(entry.name) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {images.key_of(name.removesuffix(suffix)) for name in found if name.endswith(suffix)}


def _elsewhere(root: Path, known: dict[str, list[int]], suffix: str) -> list[str]:
    """Label files in folders that hold no image; the first few of each folder."""
    found = []
    for folder, _, names in os.walk(root):
        relative = images.key_of(os.path.relpath(folder, root))
        if relative not in known and not (relative == "." and "" in known):
            found += [os.path.join(relative, name) for name in names if name.endswith(suffix)]
    return found


def _find_root(place: Path, folder: ImageFolder, suffix: str) -> Path:
    """The folder below `place` under which the images' own folders and names are found."""
    keys = [folder.keys[i] for i in spread(len(folder)).tolist()]
    level = [place]
    for _ in range(MAX_DEPTH + 1):
        scores = {candidate: _hits(candidate, keys, suffix) for candidate in level}
        best = max(scores.values(), default=0)
        fitting = [candidate for candidate, score in scores.items() if score == best]
        if best and len(fitting) > 1:
            raise LabelsError(
                f"several folders hold labels of these images: {fitting[0]}, {fitting[1]}. Name "
                "one of them.",
                code="which-labels",
            )
        if best:
            return fitting[0]
        level = sorted(Path(e.path) for c in level for e in os.scandir(c) if os.path.isdir(e.path))
    raise LabelsError(
        f"no label file of these images below {place}: looked for {stem(keys[0])}{suffix} and "
        f"others like it, up to {MAX_DEPTH} folders deep.",
        code="no-labels",
    )


def _hits(root: Path, keys: Sequence[str], suffix: str) -> int:
    """How many of some images have a label file below a folder."""
    hits = 0
    for key in keys:
        relative, name = os.path.split(key)
        hits += any(
            os.path.exists(images.path_of(root, os.path.join(relative, label + suffix)))
            for label in _candidates(name)
        )
    return hits
