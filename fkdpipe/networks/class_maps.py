"""Match the outputs of a network to the class folders of an image folder."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import ImageNetInfo

from fkdpipe.common import disk
from fkdpipe.common.errors import ModelError, UsageError

ClassMap = dict[str, int] | tuple[str, ...]  # name to output, or names in the order of the outputs


def numbered_classes(class_names: Sequence[str]) -> dict[str, int]:
    """A class map for folders named by class index, "0" to "999" (ImageNet-V2).

    Raises:
        UsageError: a folder has another name.
    """
    others = [name for name in class_names if not name.isdecimal()]
    if others:
        raise UsageError(
            f"--numbered: folders must be named by class index; found {others[0]!r}. Use "
            "--class-map FILE for other names."
        )
    return {name: int(name) for name in class_names}


def read(path: Path) -> ClassMap:
    """Read a file that maps a teacher's outputs to classes.

    Text in one column: the teacher's class names, one per line, in the order of its outputs. Text
    in two columns (tab, spaces or comma): a folder's class name and the index of its output. JSON:
    a list of names, an object from name to index, or from index to name. UTF-8, or UTF-16 with a
    byte-order mark.

    Returns:
        A tuple of names, or a dict from folder class to output index.

    Raises:
        UsageError: a URL, unreadable, in none of these forms, or a class is named twice.
    """
    path = disk.local_path(path)
    disk.refuse_pointer(path, UsageError)
    try:
        content = path.read_bytes()
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        is_json = path.suffix.lower() == ".json" or text.lstrip().startswith(("{", "["))
        if is_json:
            pairs = _from_json(json.loads(text, object_pairs_hook=tuple))
        else:
            pairs = _from_lines(text)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: the class map cannot be read: {error}.") from error
    if not pairs:
        raise UsageError(
            f"{path}: a class map has either one class name per line, in the order of the "
            "teacher's outputs, or 'class index' or 'class,index' on every line; or it is JSON: a "
            'list of names, {"class": index} or {"index": "class"}.'
        )
    if isinstance(pairs, tuple):
        return pairs
    _refuse_twice([name for name, _ in pairs], f"{path}: the class map names", UsageError)
    return dict(pairs)


def _from_lines(text: str) -> list[tuple[str, int]] | tuple[str, ...] | None:
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    fields = [[field.strip() for field in row] for row in csv.reader(lines, skipinitialspace=True)]
    if fields and all(len(row) == 2 for row in fields):
        fields = fields[1:] if not any(map(str.isdecimal, fields[0])) else fields  # a header
        for name, index in ((0, 1), (1, 0)):
            if fields and all(row[index].isdecimal() for row in fields):
                return [(row[name], int(row[index])) for row in fields]
    rows = [line.rsplit(None, 1) for line in lines]
    numbered = [len(row) == 2 and row[1].isdecimal() for row in rows]
    if rows and all(numbered):
        return [(name, int(index)) for name, index in rows]
    return tuple(" ".join(row) for row in rows) if not any(numbered) else None


def _from_json(content: Any) -> list[tuple[str, int]] | tuple[str, ...] | None:
    """Names or pairs; an object arrives as a tuple of pairs, which keeps repeated keys."""
    if isinstance(content, list):
        return tuple(content) if all(isinstance(name, str) for name in content) else None
    if not isinstance(content, tuple):
        return None
    if all(type(index) is int for _, index in content):
        return list(content)
    # {"0": "tench"}, or Keras's {"0": ["n01440764", "tench"]}
    pairs = [(name[0] if isinstance(name, list) and name else name, key) for key, name in content]
    if all(isinstance(name, str) and key.isdecimal() for name, key in pairs):
        return [(name, int(key)) for name, key in pairs]
    return None


def match_classes(
    class_names: Sequence[str],
    outputs: int,
    class_map: ClassMap | None,
    *,
    teacher: str,
) -> np.ndarray | None:
    """Match a teacher's outputs to the folder's classes.

    Uses the class map, which may come from the checkpoint; else ImageNet's synset ids, for 1,000
    outputs and folders named by them; else the order, if the numbers agree and text order is
    natural order.

    Args:
        class_names: of the folder; empty (unlabelled images) keeps all outputs.

    Returns:
        int64 (C,), the output of each class, or None for all outputs in order.

    Raises:
        ModelError: they cannot be matched; says what to provide.
    """
    if not class_names:
        return None
    if class_map is None and outputs == 1000:
        synsets = tuple(ImageNetInfo().label_names())
        if set(class_names) <= set(synsets):
            class_map = synsets
    if class_map is None:
        _check_positions(class_names, outputs, teacher)
        return None
    where = f"{teacher}: the class map names"
    if not isinstance(class_map, dict):
        folders = set(class_names)  # ImageNet itself has two cranes
        _refuse_twice([name for name in class_map if name in folders], where, ModelError)
        class_map = {name: index for index, name in enumerate(class_map)}
    missing = [name for name in class_names if name not in class_map]
    if missing:
        raise ModelError(
            f"{teacher}: {len(missing)} classes of the image folder are not among its outputs "
            f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}).",
            code="classes-differ",
        )
    columns = np.array([class_map[name] for name in class_names], dtype=np.int64)
    wrong = columns[(columns < 0) | (columns >= outputs)]
    if len(wrong):
        raise ModelError(
            f"{where} output {wrong.max()}, but there are {outputs}, counted from 0.",
            code="classes-differ",
        )
    _refuse_shared(class_names, columns, where)
    same = len(columns) == outputs and bool((columns == np.arange(outputs)).all())
    return None if same else columns


def _check_positions(class_names: Sequence[str], outputs: int, teacher: str) -> None:
    """Refuse a match by position that is a guess.

    Folders are listed in text order (as in torchvision); timm lists them in natural order, where
    numbers count as numbers and case does not count.
    """
    if outputs != len(class_names):
        raise ModelError(
            f"{teacher} has {outputs} outputs, the image folder {len(class_names)} classes. "
            "Map outputs to classes with --class-map FILE (train: --set teacher_class_map=FILE): "
            "the teacher's class names in the order of its outputs, or 'class index' on each line. "
            "An empty folder will do for a class without images.",
            code="classes-differ",
        )
    natural = sorted(class_names, key=_natural)
    if natural == list(class_names):
        return
    position = next(i for i, name in enumerate(class_names) if name != natural[i])
    indexed = all(name.isdecimal() and int(name) < outputs for name in class_names)
    numbered = "--numbered if the folders are named by output index, or " if indexed else ""
    raise ModelError(
        f"{teacher} does not record its class names, and the order of the {outputs} class folders "
        f"is not certain: class {position} is {class_names[position]!r} in text order, and "
        f"{natural[position]!r} in natural order. Use {numbered}--class-map FILE (in train, --set "
        "teacher_class_map=FILE) with the class names in the order of its outputs (`LC_ALL=C ls` "
        "lists folders in text order, `ls -v` in natural order).",
        code="order-unknown",
    )


def _natural(name: str) -> list[str | int]:
    """The sort key of timm's image folders (`timm.data.readers`)."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name.lower())]


def _refuse_twice(names: Sequence[str], where: str, error: type[UsageError | ModelError]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise error(
            f"{where} {', '.join(map(repr, twice[:3]))}{', ...' if len(twice) > 3 else ''} more "
            "than once; name every class once."
        )


def _refuse_shared(class_names: Sequence[str], columns: np.ndarray, where: str) -> None:
    values, counts = np.unique(columns, return_counts=True)
    if (counts > 1).any():
        output = values[counts > 1][0]
        sharing = [class_names[i] for i in np.flatnonzero(columns == output).tolist()]
        raise ModelError(
            f"{where} output {output} for {len(sharing)} classes ({', '.join(sharing[:3])}"
            f"{', ...' if len(sharing) > 3 else ''}); each class needs an output of its own.",
            code="classes-differ",
        )
