"""TinyViT: a folder `logits_top<K>_epoch<E>` per epoch, with one pair of files per process.

`rank<R>-keys.txt` has a key per line, `rank<R>-values.bin` a record per key: int32 seed, int16
class[K], float16 probability[K], little-endian. Keys are file names without extension, or
positions in torchvision's ImageFolder. Each epoch gives one crop. Its box is not stored; it follows
from the seed, with NumPy's PCG64 stream, timm's RandomResizedCrop and a flip. The import computes
the boxes once, for the published settings (scale 0.08 to 1, ratio 3/4 to 4/3, bicubic
interpolation, flip 0.5). The files do not record what was drawn after that (RandAugment, erasing,
mixing).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fkdpipe.common.errors import LabelsError
from fkdpipe.common.progress import Reporter, silent
from fkdpipe.interchange import exporting, imagefolder, matching
from fkdpipe.interchange.exporting import Export, Exported, ExportSettings
from fkdpipe.interchange.source import (
    SEED_FIELD,
    ImageLabels,
    ImportSettings,
    LabelSource,
    imported_distribution,
    refuse_short_ids,
    scratch_table,
)
from fkdpipe.interchange.torchfile import BrokenFileError
from fkdpipe.pixels import crops
from fkdpipe.pixels.images import ImageFolder
from fkdpipe.storage.labels import Form
from fkdpipe.storage.store import Store

_LINES = 100_000  # keys looked up at once
_TRIES = 10
_SCALE, _RATIO, _FLIP = (0.08, 1.0), (3 / 4, 4 / 3), 0.5


def record(k: int) -> np.dtype:
    """One label: seed, classes, probabilities."""
    return np.dtype([("seed", "<i4"), ("index", "<i2", (k,)), ("prob", "<f2", (k,))])


def resolve(seed: int, height: int, width: int) -> tuple[int, int, int, int, bool]:
    """(top, left, height, width, flip) that a seed gives for an image of this size."""
    stream = iter(np.random.Generator(np.random.PCG64(seed)).random(4 * _TRIES + 1).tolist())
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for _ in range(_TRIES):
        area = (next(stream) * (_SCALE[1] - _SCALE[0]) + _SCALE[0]) * (height * width)
        aspect = math.exp(next(stream) * (high - low) + low)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            top = min(int(next(stream) * (height - h + 1)), height - h)
            left = min(int(next(stream) * (width - w + 1)), width - w)
            return top, left, h, w, next(stream) < _FLIP
    w, h = width, height
    if width / height < _RATIO[0]:
        h = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(height * _RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w, next(stream) < _FLIP


@dataclass(frozen=True)
class _Records:
    """Records of all epochs. record_EN: number of each image's record, -1 if there is none."""

    values: list[list[np.ndarray]]  # epoch, process
    starts: list[np.ndarray]  # epoch -> number of the first record of each process
    record_EN: np.ndarray
    extra: int  # records whose key belongs to no image, or to several
    extra_examples: tuple[str, ...]

    def of(self, position: int) -> np.ndarray:
        """The records of an image, one per epoch; raises BrokenFileError if one is missing."""
        numbers = self.record_EN[:, position].tolist()
        if -1 in numbers:
            missing = numbers.count(-1)
            raise BrokenFileError("no-label", f"{missing} of {len(numbers)} epochs have no record")
        records = []
        for epoch, number in enumerate(numbers):
            rank = int(np.searchsorted(self.starts[epoch], number, side="right")) - 1
            records.append(self.values[epoch][rank][number - self.starts[epoch][rank]])
        return np.stack(records)


def open_labels(path: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """Open TinyViT's saved logits, with one crop per epoch.

    Raises:
        LabelsError: no such folders, files that do not match, ids beyond int16, or
            `assume_plain` is not set.
    """
    epochs, k = _epochs(path)
    if not settings.assume_plain:
        raise LabelsError(
            "TinyViT's files hold a seed per label, which gives the box and the flip, but do not "
            "record what else was drawn from it. With its default settings that is RandAugment, "
            "erasing, mixup and cutmix: such labels belong to other pixels and must not be used. "
            "If these were made with crop and flip alone, use --assume-plain.",
            code="transformed",
        )
    classes = settings.classes or len(folder.class_names)
    refuse_short_ids(classes, str(path))
    epochs = epochs[: settings.crops] if settings.crops else epochs
    if settings.crops and len(epochs) < settings.crops:
        raise LabelsError(f"{path} has {len(epochs)} epochs, fewer than --crops {settings.crops}.")
    named, records = _match(epochs, k, folder)

    def read(position: int) -> ImageLabels:
        record_M = records.of(position)
        height, width = folder.size_N2[position].tolist()
        try:
            crop_M5 = np.array([resolve(seed, height, width) for seed in record_M["seed"].tolist()])
        except ValueError as error:
            raise BrokenFileError("broken-label", f"invalid seed: {error}") from error
        return ImageLabels(
            box_M4=crop_M5[:, :4].astype(np.int64),
            flip_M=crop_M5[:, 4].astype(bool),
            ids_MK=record_M["index"].astype(np.int64),
            prob_MK=record_M["prob"].astype(np.float32),
            seed_M=record_M["seed"],
        )

    distribution = imported_distribution(
        "tinyvit", len(epochs), scale=_SCALE, ratio=_RATIO, flip=_FLIP
    )
    return LabelSource(
        format="tinyvit",
        form=Form("topk", k),
        classes=classes,
        classes_known=settings.classes is not None,
        crops=len(epochs),
        distribution=replace(distribution, others={"keys": "names" if named else "index"}),
        fingerprint=_fingerprint(epochs),
        read=read,
        fields=(SEED_FIELD,),
        extra=records.extra,
        extra_examples=records.extra_examples,
    )  # fmt: skip


def _epochs(root: Path) -> tuple[list[Path], int]:
    """Folders of the epochs in order, and K.

    Raises:
        LabelsError: there are none, or their K differ.
    """
    folders = {}
    for path in [root, *root.glob("*")]:
        name = re.fullmatch(r"logits_top(\d{1,5})_epoch(\d{1,6})", path.name)
        if name and path.is_dir():
            folders[int(name[2])] = (path, int(name[1]))
    if not folders:
        raise LabelsError(f"{root} has no folder logits_top<K>_epoch<E>.", code="no-labels")
    widths = {k for _, k in folders.values()}
    if len(widths) > 1 or 0 in widths:
        raise LabelsError(f"{root} has labels of different K: {sorted(widths)}.")
    return [folders[epoch][0] for epoch in sorted(folders)], widths.pop()


def _ranks(epoch: Path) -> list[tuple[Path, Path]]:
    """(keys, values) of each process, in order."""
    numbered = {
        int(m[1]): p for p in epoch.iterdir() if (m := re.fullmatch(r"rank(\d+)-keys.txt", p.name))
    }
    return [(numbered[n], epoch / f"rank{n}-values.bin") for n in sorted(numbered)]


def _match(epochs: list[Path], k: int, folder: ImageFolder) -> tuple[bool, _Records]:
    """Whether keys are names, and the records of each epoch, matched to images."""
    named = _named(epochs[0])
    lookup = _Names(folder) if named else _Indices(folder)
    record_EN = scratch_table(len(epochs), len(folder))
    values, starts = [], []
    extra, examples = 0, dict[str, None]()
    for number, epoch in enumerate(epochs):
        maps, counts = [], [0]
        for keys, binary in _ranks(epoch):
            at = counts[-1]
            for lines in _lines(keys):
                position = lookup.positions(lines)
                here = np.arange(at, at + len(lines))
                fresh = position >= 0
                extra += int((~fresh).sum())
                if len(examples) < matching.EXAMPLES:
                    examples |= dict.fromkeys(lines[i] for i in np.flatnonzero(~fresh))
                fresh[fresh] = record_EN[number, position[fresh]] < 0  # the first record counts
                record_EN[number, position[fresh]] = here[fresh]
                at += len(lines)
            maps.append(_values(binary, k, at - counts[-1]))
            counts.append(at)
        if not maps or counts[-1] == 0:
            raise LabelsError(f"{epoch} has no records.", code="no-labels")
        values.append(maps)
        starts.append(np.array(counts[:-1]))
    listed = tuple(itertools.islice(examples, matching.EXAMPLES))
    return named, _Records(values, starts, record_EN, extra, listed)


def _values(file: Path, k: int, count: int) -> np.ndarray:
    """The records of a process.

    Raises:
        LabelsError: the file is missing, or does not have the length of `count` records.
    """
    length = file.stat().st_size if file.is_file() else 0
    if length != count * record(k).itemsize:
        raise LabelsError(
            f"{file} has {length:,} bytes, and {count:,} keys of K = {k} need "
            f"{count * record(k).itemsize:,}. It was truncated, or K is different.",
            code="broken-labels",
        )
    if not count:
        return np.empty(0, dtype=record(k))
    return np.memmap(file, dtype=record(k), mode="r")


def _lines(file: Path) -> Iterator[list[str]]:
    try:
        with open(file, encoding="utf-8") as text:
            while lines := [line.strip() for line in itertools.islice(text, _LINES)]:
                yield lines
    except UnicodeDecodeError as error:
        message = f"{file} is not a list of keys: {error}."
        raise LabelsError(message, code="broken-labels") from error


def _named(epoch: Path) -> bool:
    """Are keys file names (or else numbers)?"""
    first = next((lines for keys, _ in _ranks(epoch) for lines in _lines(keys)), [])
    return not all(key.isascii() and key.isdigit() for key in first)


class _Indices:
    """Keys that are positions in torchvision's ImageFolder."""

    def __init__(self, folder: ImageFolder) -> None:
        index_N = imagefolder.index_of(folder.keys, (r.key for r in folder.rejected))
        self._position = np.full(max(int(index_N.max()) + 1, 1), -1, dtype=np.int64)
        self._position[index_N[index_N >= 0]] = np.flatnonzero(index_N >= 0)

    def positions(self, lines: list[str]) -> np.ndarray:
        """int64: positions of these keys in the folder, -1 for none."""
        try:
            index = np.array([int(line) if len(line) < 19 else -1 for line in lines])
        except ValueError as error:
            raise LabelsError(f"a non-numeric key among numeric keys: {error}.") from error
        known = (index >= 0) & (index < len(self._position))
        return np.where(known, self._position[np.where(known, index, 0)], -1)


class _Names:
    """Keys that are file names without extension; a name used twice matches no image."""

    def __init__(self, folder: ImageFolder) -> None:
        names = [matching.stem(key.rsplit("/", 1)[-1]) for key in folder.keys]
        ids = crops.image_ids(names)
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]

    def positions(self, lines: list[str]) -> np.ndarray:
        """int64: positions of these keys in the folder, -1 for none."""
        ids = crops.image_ids(lines)
        begin = np.searchsorted(self._sorted, ids, side="left")
        end = np.searchsorted(self._sorted, ids, side="right")
        position = self._order[np.minimum(begin, len(self._order) - 1)]
        return np.where(end - begin == 1, position, -1)


def _fingerprint(epochs: list[Path]) -> str:
    """sha256 (hex) of the beginning of the first epoch's files."""
    digest = hashlib.sha256()
    for keys, values in _ranks(epochs[0]):
        for file in (keys, values):
            with open(file, "rb") as opened:
                digest.update(opened.read(2**16))
    return digest.hexdigest()


def write_labels(
    store: Store, out: Path, settings: ExportSettings, *, reporter: Reporter = silent
) -> Exported:
    """Write a store's labels as TinyViT's trainer reads them, one epoch per crop.

    Raises:
        LabelsError: the crops did not come from TinyViT's seeds, the store has colour jitter, ids
            exceed int16, or `out` is not empty.
    """
    export = Export(store, settings)
    exporting.refuse_jitter(export, "TinyViT")
    if not export.seeds:
        raise LabelsError(
            f"{store.url}: TinyViT's files hold the seed that a crop was drawn from, not its box, "
            "and only crops that were imported from TinyViT have one. With any other seed, its "
            "trainer would use other boxes than these labels belong to.",
            code="no-seeds",
        )
    refuse_short_ids(export.classes, "TinyViT's format")
    root = exporting.empty_folder(out)
    listed = [str(key) for key in store.images.keys]
    if export.finished.crops[0].part.settings.others.get("keys") == "names":
        keys = [matching.stem(key.rsplit("/", 1)[-1]) for key in listed]
    else:
        rejected = (row[0] for row in store.images.rejected)
        keys = [str(index) for index in imagefolder.index_of(listed, rejected).tolist()]
    folders = [root / f"logits_top{export.keep}_epoch{m}" for m in range(export.crops)]
    for folder in folders:
        folder.mkdir()
    with reporter.task("export", store.num_images, "images") as advance:
        for unit in export.units(advance):
            text = "".join(f"{keys[row]}\n" for row in unit.rows.tolist())
            records = np.empty(unit.flip_IM.shape, dtype=record(export.keep))
            records["seed"] = export.seeds_of(unit)
            records["index"], records["prob"] = unit.ids_IMK, unit.prob_IMK
            for m, folder in enumerate(folders):
                with open(folder / "rank0-keys.txt", "a", encoding="utf-8") as file:
                    file.write(text)
                with open(folder / "rank0-values.bin", "ab") as binary:
                    binary.write(records[:, m].tobytes())
    notes = (
        *export.notes(),
        "TinyViT's files do not hold the teacher or its settings; its trainer must crop with "
        "scale 0.08 to 1, ratio 3/4 to 4/3, bicubic, and no other transformation",
    )
    return Exported(len(export.finished.rows), 2 * len(folders), notes)
