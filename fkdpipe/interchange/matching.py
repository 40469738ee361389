"""Match label files to images by their folders and names, below any root folder.

Names are compared folder by folder, so the names of all label files are never in memory at once.
The list of images is; `benchmarks/interchange.py` measures its memory.
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

MAX_DEPTH = 4  # folders between the user's path and the class folders
SAMPLE = 32
EXAMPLES = 20

_NONE, _AMBIGUOUS, _FIRST = 0, 1, 2  # from _FIRST on: index of the label's name in `_candidates`


@dataclass(frozen=True)
class LabelTree:
    """A tree of label files, matched to an image folder.

    Attributes:
        root: folder with the same subfolders as the images. suffix: of the label files.
        keys: of the images. kind_N: uint8, which kind of name the label has.
        extra: number of label files without an image. extra_examples: some of them.
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
            BrokenFileError: "no-label", or "ambiguous-label" if several images match it.
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
        """Bytes of an image's label file; raises BrokenFileError if it cannot be read."""
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
        """The parsed content of the first readable file of the sample.

        Raises:
            LabelsError: none can be read.
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
        """sha256 (hex) of a few label files, enough to tell two sets of labels apart."""
        digest = hashlib.sha256()
        for position in self.sample():
            digest.update(self.keys[position].encode() + b"\0" + self.read(position))
        return digest.hexdigest()


def spread(count: int) -> np.ndarray:
    """int64: up to `SAMPLE` of `count` positions, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).astype(np.int64))


def stem(name: str) -> str:
    """A file name without its last extension."""
    return name.rsplit(".", 1)[0] if "." in name[1:] else name


def cut(name: str) -> str:
    """A file name up to its first dot, which is how FKD's and ReLabel's tools name labels."""
    return name.split(".", 1)[0]


def cut_name(key: str) -> str:
    """A path whose last part is `cut`."""
    folder, name = os.path.split(key)
    return os.path.join(folder, cut(name))


def _candidates(name: str) -> tuple[str, str, str]:
    """Possible names of an image's label, without the suffix, the most specific first."""
    return name, stem(name), cut(name)


def match(path: Path, folder: ImageFolder, suffix: str) -> LabelTree:
    """Find the label files of a folder's images below a path.

    Raises:
        LabelsError: the path does not exist, no file matches, or more than half of the images have
            no label file.
    """
    if not path.is_dir():
        raise LabelsError(f"{path}: no such folder of label files.", code="no-labels")
    root = _find_root(path, folder, suffix)
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
    for name in _elsewhere(root, by_folder, suffix):
        extra += 1
        if len(examples) < EXAMPLES:
            examples.append(name)
    missing = int((kind_N == _NONE).sum())
    if missing > len(folder) / 2:
        keys = [folder.keys[p] for p in np.flatnonzero(kind_N == _NONE)[:3]]
        raise LabelsError(
            f"{missing:,} of {len(folder):,} images have no label file below {root}, for example "
            f"{', '.join(keys)}. Check that {path} is the right folder, and that it was made for "
            f"the images in {folder.root}.",
            code="wrong-folder",
        )
    return LabelTree(root, suffix, folder.keys, kind_N, extra, tuple(examples))


def _kinds(names: list[str], labels: set[str]) -> tuple[list[int], set[str]]:
    """The kind of each image's label name in one folder, and the labels that match no image."""
    indices = [
        next((k for k, label in enumerate(_candidates(name)) if label in labels), None)
        for name in names
    ]
    matches = [
        None if k is None else _candidates(name)[k] for name, k in zip(names, indices, strict=True)
    ]
    counts = Counter(matches)
    kinds = [
        _NONE if k is None else _AMBIGUOUS if counts[match] > 1 else _FIRST + k
        for k, match in zip(indices, matches, strict=True)
    ]
    return kinds, labels - set(filter(None, matches))


def _label_names(root: Path, relative: str, suffix: str) -> set[str]:
    """Names of the label files in one folder, without the suffix."""
    path = images.path_of(root, relative) if relative else os.fsencode(root)
    try:
        entries = [e for e in os.scandir(path) if not e.is_dir(follow_symlinks=False)]
        names = [os.fsdecode(entry.name) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {images.key_of(name.removesuffix(suffix)) for name in names if name.endswith(suffix)}


def _elsewhere(root: Path, known: dict[str, list[int]], suffix: str) -> list[str]:
    """Label files in folders without images."""
    files: list[str] = []
    for folder, _, names in os.walk(root):
        relative = images.key_of(os.path.relpath(folder, root))
        if relative not in known and not (relative == "." and "" in known):
            files += [os.path.join(relative, name) for name in names if name.endswith(suffix)]
    return files


def _find_root(path: Path, folder: ImageFolder, suffix: str) -> Path:
    """The folder below `path` that has the images' folders and names."""
    keys = [folder.keys[i] for i in spread(len(folder)).tolist()]
    level = [path]
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
        f"no label file of these images below {path}: looked for {stem(keys[0])}{suffix} and "
        f"similar names, up to {MAX_DEPTH} folders deep.",
        code="no-labels",
    )


def _hits(root: Path, keys: Sequence[str], suffix: str) -> int:
    """The number of keys that have a label file below a folder."""
    hits = 0
    for key in keys:
        relative, name = os.path.split(key)
        hits += any(
            os.path.exists(images.path_of(root, os.path.join(relative, label + suffix)))
            for label in _candidates(name)
        )
    return hits
