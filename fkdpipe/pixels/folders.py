"""Which folders of an image folder are splits, and which are classes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from fkdpipe.common import disk
from fkdpipe.common.errors import ImagesError

T = TypeVar("T")
Split = Literal["train", "val"]

_NAMES = {"train": "train|training", "val": "val|valid|validation|dev|eval", "test": "test|testing"}
_AROUND = r"(?:(?:seg|images?|data)[ _-]?)?(?:{})(?:[ _-]?(?:set|data|images?|split|\d{{4}}))?"


def split_root(data: Path, split: Split) -> Path:
    """The folder of a split's classes, or `data` itself for `train` if it has no splits.

    Splits are recognised by their usual names, without case: `train`, `Training`, `valid`,
    `test_set`. A doubled folder, as archives unpack to (`set/set/train`), is entered.

    Raises:
        ImagesError: the folder or the split does not exist, or two folders may be the split.
    """
    inner, splits = _find_splits(data)
    if not splits and split == "train":
        return inner
    names = splits.get(split, ())
    if len(names) > 1 and split not in names:
        raise ImagesError(
            f"{inner} has {' and '.join(f'{name}/' for name in names)}, which may both be the "
            f"{split} split. Rename one of them to {split}/.",
            code="no-split",
        )
    if names:
        return _doubled(inner / (split if split in names else names[0]))
    folders = " and ".join(sorted(f"{name}/" for found in splits.values() for name in found))
    what = "Held-out" if split == "val" else "Training"
    raise ImagesError(
        f"{data} has {folders or 'class folders'}, but no {split}/ folder. {what} images belong in "
        f"{inner / split}.",
        code="no-split",
    )


def splits_of(data: Path) -> dict[str, tuple[str, ...]]:
    """Folders by split (train, val, test); empty if the folders are classes.

    Folders are splits if they include a training and a held-out one, or if all are named as splits.

    Raises:
        ImagesError: the folder does not exist. UsageError: it is a URL.
    """
    return _find_splits(data)[1]


def _find_splits(data: Path) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """The folder that holds the splits or classes, and its splits."""
    disk.local_path(data)
    if not data.exists():
        raise ImagesError(f"{data}: no such folder.", code="no-folder")
    if not data.is_dir():
        raise ImagesError(
            f"{data} is a file; give an image folder (class/image).", code="no-folder"
        )
    try:
        inner = _doubled(data)
        return inner, _splits_among(_folders(inner))
    except OSError as error:
        raise ImagesError(f"{data} cannot be read: {error.strerror}.", code="no-folder") from error


def _splits_among(folders: list[str]) -> dict[str, tuple[str, ...]]:
    splits = {
        split: tuple(f for f in folders if re.fullmatch(_AROUND.format(names), f.lower()))
        for split, names in _NAMES.items()
    }
    splits = {split: found for split, found in splits.items() if found}
    both = "train" in splits and len(splits) > 1
    only = splits.keys() & {"train", "val"} and sum(map(len, splits.values())) == len(folders)
    return splits if both or only else {}


def _doubled(folder: Path) -> Path:
    """The folder within a folder that holds nothing else, if it has splits or the same name.

    A single class with images in it is not entered.
    """
    folders = _folders(folder)
    if len(folders) != 1:
        return folder
    inner = folder / folders[0]
    try:
        among = _folders(inner)
        with os.scandir(inner) as entries:
            files = any(not hidden(entry.name) and entry.is_file() for entry in entries)
    except OSError:  # the scan says so
        return folder
    same = inner.name.lower() == Path(os.path.abspath(folder)).name.lower()
    if among and same and not files:
        return inner
    named = bool(_splits_among(folders))  # train/ alone is a split, not a doubled folder
    return inner if _splits_among(among) and not named else folder


def _folders(root: Path) -> list[str]:
    entries = from_disk(str(root), lambda: list(os.scandir(root)))
    return sorted(e.name for e in entries if not hidden(e.name) and leads_to(e))


def class_folders(root: Path) -> list[str]:
    """Sorted names of the class folders in a split's root, as the operating system has them."""
    return _folders(root)


def refuse_unclassed(root: Path, keys: list[str]) -> None:
    """Refuse folders that are taken for classes, but hold only folders: splits or class groups.

    Args:
        keys: paths of all images relative to root, of class folders or deeper.

    Raises:
        ImagesError: with code "not-classes"; says what was taken for what.
    """
    parts = [key.split("/") for key in keys]
    direct = {path[0] for path in parts if len(path) == 2}
    deep = [path for path in parts if len(path) > 2 and path[0] not in direct]
    taken = sorted({path[0] for path in deep})
    if not taken:
        return
    inside = sorted({path[1] for path in deep if path[0] == taken[0]})
    raise ImagesError(
        f"{root}: {_some(taken)} {'is' if len(taken) == 1 else 'are'} taken for "
        f"{'a class' if len(taken) == 1 else 'classes'}, but no image lies directly in "
        f"{taken[0]}/, only folders ({_some(inside)}). If those are the classes, give "
        f"{root / taken[0]}, or name the folders of the splits train/ and val/. If {taken[0]} is a "
        "class, put its images directly into its folder.",
        code="not-classes",
    )


def _some(names: list[str]) -> str:
    return ", ".join(f"{name}/" for name in names[:3]) + (", ..." if len(names) > 3 else "")


def hidden(name: str) -> bool:
    """Whether a folder is not for people: .git, and what macOS puts into archives."""
    return name.startswith(".") or name == "__MACOSX"


def leads_to(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The status of a folder; None for a file or a broken link."""
    try:
        return from_disk(entry.path, lambda: entry.stat() if entry.is_dir() else None)
    except OSError:  # a link to itself
        return None


def from_disk(path: str, read: Callable[[], T]) -> T:
    """The result of `read`. A temporary error stops the scan, so that no file is left out for it.

    Raises:
        ImagesError: the disk failed twice. OSError: the file itself is broken.
    """
    try:
        return disk.read_twice(read)
    except OSError as error:
        if not disk.may_pass(error):
            raise
        raise ImagesError(
            f"{os.fsencode(path).decode(errors='replace')}: {error.strerror}. This error may be "
            "temporary, so the file is not left out. Run the command again; if it fails again, "
            "repair the disk or remove the file.",
            code="disk",
        ) from error
