"""An image folder as an ordered, fingerprinted list.

A folder is scanned once, by one process; the store holds the result, so training never scans.
Only headers are read here. A truncated image is found, and recorded, when phase 1 decodes it.

Keys are paths relative to the split's root, with "/" between folders. Stores hold them as text, so
bytes that are not UTF-8 are written as %XX and "%" itself as %25. This is reversible, and leaves
ordinary names unchanged.
"""

from __future__ import annotations

import errno
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, UnidentifiedImageError

from fkdpipe.common import disk
from fkdpipe.common.errors import ImagesError
from fkdpipe.pixels import folders
from fkdpipe.pixels.folders import Split
from fkdpipe.pixels.folders import split_root as split_root
from fkdpipe.pixels.folders import splits_of as splits_of

MAX_SIDE = 65_535  # boxes are stored as uint16 pixels


@dataclass(frozen=True)
class Rejected:
    """A file that is left out, and why. `reason` is a stable code, `detail` is a message."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ImageFolder:
    """One split of an image folder.

    Attributes:
        root: the split's root; `keys` are relative to it.
        class_names: class folders in order of name (as torchvision's ImageFolder); empty for a
            flat folder. A class folder without images keeps its index.
        keys: one per image, in order of class, then path.
        class_N: int32, index into `class_names`, -1 in a flat folder.
        size_N2: uint16, (height, width) of the decoded image, EXIF orientation not applied.
        bytes_N: int64, length of the file.
        rejected: files that are left out.
    """

    root: Path
    class_names: tuple[str, ...]
    keys: tuple[str, ...]
    class_N: np.ndarray
    size_N2: np.ndarray
    bytes_N: np.ndarray
    rejected: tuple[Rejected, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: np.ndarray) -> ImageFolder:
        """Select images, in the order of `rows`."""
        return replace(
            self,
            keys=tuple(self.keys[row] for row in rows.tolist()),
            class_N=self.class_N[rows],
            size_N2=self.size_N2[rows],
            bytes_N=self.bytes_N[rows],
        )

    @property
    def empty_classes(self) -> tuple[str, ...]:
        counts = np.bincount(self.class_N[self.class_N >= 0], minlength=len(self.class_names))
        return tuple(
            name for name, count in zip(self.class_names, counts, strict=True) if not count
        )

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.keys, self.bytes_N)


def fingerprint(keys: tuple[str, ...], bytes_N: np.ndarray) -> str:
    """sha256 (hex) of the sorted pairs of key and file length; independent of order and folder."""
    digest = hashlib.sha256()
    for key, length in sorted(zip(keys, bytes_N.tolist(), strict=True)):
        digest.update(f"{key}\0{length}\n".encode())
    return digest.hexdigest()


def key_of(relative: str) -> str:
    """The key of a relative path (from `os`, with surrogate escapes): text that UTF-8 can hold."""
    text = relative.replace("%", "%25").replace(os.sep, "/")
    return "".join(f"%{ord(c) - 0xDC00:02X}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)


def path_of(root: Path, key: str) -> bytes:
    """The path of a key's file, as the operating system's bytes.

    Raises:
        ImagesError: the key points outside the folder (a store may come from others).
    """
    parts = (unquote_to_bytes(key) if "%" in key else key.encode()).split(b"/")
    if not all(parts) or b".." in parts or b"." in parts:
        raise ImagesError(f"{key!r} is not the path of an image below {root}.", code="bad-key")
    return os.path.join(os.fsencode(root), *parts)


def class_folders(root: Path) -> tuple[str, ...]:
    """Sorted names of the class folders in a split's root, encoded as in keys."""
    return tuple(key_of(name) for name in folders.class_folders(root))


def scan(
    data: Path,
    *,
    split: Split = "train",
    need_classes: bool = True,
    threads: int = 8,
    on_image: Callable[[int], None] = lambda count: None,
) -> ImageFolder:
    """Read the list of images of one split: names, classes, sizes.

    Args:
        data: `class/name.jpg`, with folders beside the images or not, or `train/` and `val/` with
            the same.
        need_classes: if False, images directly in the folder are accepted.
        threads: number of threads that read headers.
        on_image: called with 1 after every file, for progress.

    Raises:
        ImagesError: no folder, no class folders or no usable image, a class folder that holds only
            folders, or the disk failed twice.
    """
    root = split_root(Path(data), split)
    class_names = class_folders(root)
    files, rejected = _list_files(root)
    if not class_names and files and need_classes:
        raise ImagesError(
            f"{root} has {len(files)} files but no class folders. Put images in one folder per "
            "class: class/name.jpg.",
            code="no-classes",
        )
    class_index = {name: index for index, name in enumerate(class_names)}

    def header(relative: str) -> tuple[tuple[int, int], int] | Rejected:
        path, key = os.path.join(root, relative), key_of(relative)
        result = folders.from_disk(path, lambda: _read_header(path, key))
        on_image(1)
        return result

    with ThreadPoolExecutor(threads) as pool:
        headers = list(pool.map(header, files))
    keys: list[str] = []
    classes: list[int] = []
    sizes: list[tuple[int, int]] = []
    lengths: list[int] = []
    for relative, result in zip(files, headers, strict=True):
        key = key_of(relative)
        folder = key.split("/", 1)[0] if "/" in key else ""
        if isinstance(result, Rejected):
            rejected.append(result)
        elif not folder and class_names:
            rejected.append(Rejected(key, "outside-class", "not in a class folder"))
        else:
            keys.append(key)
            classes.append(class_index.get(folder, -1))
            sizes.append(result[0])
            lengths.append(result[1])
    if class_names:
        folders.refuse_unclassed(root, keys)
    if not keys:
        raise ImagesError(_nothing_usable(root, rejected), code="no-images")
    return ImageFolder(
        root=root,
        class_names=class_names,
        keys=tuple(keys),
        class_N=np.array(classes, dtype=np.int32),
        size_N2=np.array(sizes, dtype=np.uint16),
        bytes_N=np.array(lengths, dtype=np.int64),
        rejected=tuple(sorted(rejected, key=lambda r: r.key)),
    )


def remarks(folder: ImageFolder, most: int = 20) -> list[str]:
    """Warnings about a folder for the user, one line each."""
    left_out = [f"{r.key} is left out: {r.reason}, {r.detail}" for r in folder.rejected]
    lines = left_out[:most]
    if len(left_out) > most:
        lines.append(f"... and {len(left_out) - most} more files are left out")
    if folder.empty_classes:
        lines.append(f"classes without images: {', '.join(folder.empty_classes[:10])}")
    return lines


def check_same_classes(expected: tuple[str, ...], found: tuple[str, ...], *, where: str) -> None:
    """Refuse a different list of classes, naming the first differences.

    Raises:
        ImagesError: with code "classes-differ".
    """
    if expected == found:
        return
    missing = [name for name in expected if name not in set(found)]
    extra = [name for name in found if name not in set(expected)]
    detail = "; ".join(
        f"{word} {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for word, names in (("missing", missing), ("unknown", extra))
        if names
    )
    raise ImagesError(
        f"{where}: its {len(found)} classes are not the {len(expected)} expected ones: "
        f"{detail or 'their order differs'}."
        f"{' An empty folder will do for a class without images.' if missing else ''}",
        code="classes-differ",
    )


def _nothing_usable(root: Path, rejected: list[Rejected]) -> str:
    if not rejected:
        return f"{root}: no images found."
    reasons = sorted({r.reason for r in rejected})
    first = rejected[0]
    return (
        f"{root}: no usable image among {len(rejected)} files ({', '.join(reasons)}); "
        f"for example {first.key}: {first.detail}."
    )


def _list_files(root: Path) -> tuple[list[str], list[Rejected]]:
    """Relative paths of all files below root, sorted by folder then name, following links."""
    files: list[str] = []
    rejected: list[Rejected] = []

    def walk(folder: str, relative: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        try:
            entries = folders.from_disk(
                folder, lambda: sorted(os.scandir(folder), key=lambda e: e.name)
            )
        except OSError as error:
            rejected.append(Rejected(key_of(relative), "unreadable", error.strerror or str(error)))
            return
        for entry in entries:
            name = os.path.join(relative, entry.name) if relative else entry.name
            if status := folders.leads_to(entry):
                identity = (status.st_dev, status.st_ino)
                if folders.hidden(entry.name):
                    rejected.append(Rejected(key_of(name), "hidden", "hidden folder"))
                elif identity in above:
                    rejected.append(Rejected(key_of(name), "link-loop", "links to a folder above"))
                else:
                    yield from walk(entry.path, name, above | {identity})
            else:
                yield name

    status = os.stat(root)
    files.extend(walk(str(root), "", frozenset({(status.st_dev, status.st_ino)})))
    return files, rejected


def _read_header(path: str, key: str) -> tuple[tuple[int, int], int] | Rejected:
    """((height, width), file length) of a JPEG, PNG or WebP, or why it is left out."""
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            head = file.read(32)
            kind = _kind(head)
            if kind is None:
                detail = "empty file" if not head else "its content is not JPEG, PNG or WebP"
                if head.startswith(disk.LFS_POINTER):
                    detail = "a git-lfs pointer in place of the image; run `git lfs pull`"
                return Rejected(key, "not-an-image", detail)
            if kind == "PNG" and head[24:25] == b"\x10":
                return Rejected(key, "16-bit", "16-bit PNG; convert it to 8 bits per channel")
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large images and odd EXIF data
                with Image.open(file) as image:
                    width, height = image.size
                    animated = kind != "JPEG" and getattr(image, "n_frames", 1) > 1
    except UnidentifiedImageError:
        return Rejected(key, "broken-header", "its header cannot be read")
    except Image.DecompressionBombError as error:
        return Rejected(key, "too-large", str(error))
    except OSError as error:
        if disk.may_pass(error):
            raise
        reason = "unreadable" if error.errno is not None else "broken-header"
        reason = "link-loop" if error.errno == errno.ELOOP else reason
        return Rejected(key, reason, error.strerror or str(error))
    except (SyntaxError, ValueError, IndexError) as error:  # Pillow's parsers on damaged headers
        return Rejected(key, "broken-header", str(error))
    if animated:
        return Rejected(key, "animation", "animated image; keep one frame")
    if max(height, width) > MAX_SIDE or min(height, width) < 1:
        detail = f"{width}x{height} pixels; the largest side is {MAX_SIDE}"
        return Rejected(key, "too-large", detail)
    return (height, width), length


def size_of(root: Path, key: str) -> tuple[int, int] | Rejected:
    """(height, width) of a key's decoded image, from its header, or why it is left out.

    Raises:
        ImagesError: the key points outside the folder, or the disk failed twice.
    """
    path = os.fsdecode(path_of(root, key))
    result = folders.from_disk(path, lambda: _read_header(path, key))
    return result if isinstance(result, Rejected) else result[0]


def _kind(head: bytes) -> str | None:
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    return None
