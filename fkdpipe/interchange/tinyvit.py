"""TinyViT: per epoch a folder `logits_top<K>_epoch<E>` with one pair of files per process.

`rank<R>-keys.txt` has a key per line, `rank<R>-values.bin` a record per key: int32 seed, int16
class[K], float16 probability[K], little-endian. Keys are file names without extension, or
positions in torchvision's ImageFolder. An epoch is a crop; its box is not stored, but what its
seed draws: NumPy's PCG64 stream, consumed by timm's RandomResizedCrop and flip. Seeds are
resolved to boxes here once, for the published settings (scale 0.08 to 1, ratio 3/4 to 4/3, bicubic
interpolation, flip 0.5). Whatever was drawn after that (RandAugment, erasing, mixing) is not
recorded in the files.
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
    """(top, left, height, width, flip) that a seed draws in an image of this size."""
    drawn = iter(np.random.Generator(np.random.PCG64(seed)).random(4 * _TRIES + 1).tolist())
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for _ in range(_TRIES):
        area = (next(drawn) * (_SCALE[1] - _SCALE[0]) + _SCALE[0]) * (height * width)
        aspect = math.exp(next(drawn) * (high - low) + low)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            top = min(int(next(drawn) * (height - h + 1)), height - h)
            left = min(int(next(drawn) * (width - w + 1)), width - w)
            return top, left, h, w, next(drawn) < _FLIP
    w, h = width, height
    if width / height < _RATIO[0]:
        h = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(height * _RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w, next(drawn) < _FLIP


@dataclass(frozen=True)
class _Records:
    """Records of all epochs: place_EN says which, -1 where an epoch has none of an image."""

    values: list[list[np.ndarray]]  # epoch, process
    starts: list[np.ndarray]  # epoch -> number of the first record of each process
    place_EN: np.ndarray
    extra: int  # records whose key is that of no image, or of several
    extra_examples: tuple[str, ...]

    def of(self, position: int) -> np.ndarray:
        """The records of an image, one per epoch; raises BrokenFileError when one is missing."""
        places = self.place_EN[:, position].tolist()
        if -1 in places:
            lost = places.count(-1)
            raise BrokenFileError("no-label", f"{lost} of {len(places)} epochs have no record")
        found = []
        for epoch, place in enumerate(places):
            rank = int(np.searchsorted(self.starts[epoch], place, side="right")) - 1
            found.append(self.values[epoch][rank][place - self.starts[epoch][rank]])
        return np.stack(found)


def open_labels(place: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """TinyViT's saved logits, one crop per epoch.

    Raises:
        LabelsError: no such folders, files that do not fit together, ids beyond int16, or nothing
            is said of how the labels were made.
    """
    epochs, k = _epochs(place)
    if not settings.assume_plain:
        raise LabelsError(
            "TinyViT's files keep a seed per label, from which the box and the flip follow, but "
            "not what else was drawn from it. With its default settings that is RandAugment, "
            "erasing, mixup and cutmix: such labels belong to other pixels and must not be used. "
            "If these were made with crop and flip alone, say --assume-plain.",
            code="transformed",
        )
    classes = settings.classes or len(folder.class_names)
    refuse_short_ids(classes, str(place))
    epochs = epochs[: settings.crops] if settings.crops else epochs
    if settings.crops and len(epochs) < settings.crops:
        raise LabelsError(f"{place} has {len(epochs)} epochs, fewer than --crops {settings.crops}.")
    named, records = _match(epochs, k, folder)

    def read(position: int) -> ImageLabels:
        found = records.of(position)
        height, width = folder.size_N2[position].tolist()
        try:
            drawn = np.array([resolve(seed, height, width) for seed in found["seed"].tolist()])
        except ValueError as error:
            raise BrokenFileError("broken-label", f"a seed that is none: {error}") from error
        return ImageLabels(
            box_M4=drawn[:, :4].astype(np.int64),
            flip_M=drawn[:, 4].astype(bool),
            ids_MK=found["index"].astype(np.int64),
            prob_MK=found["prob"].astype(np.float32),
            seed_M=found["seed"],
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


def _epochs(place: Path) -> tuple[list[Path], int]:
    """Folders of the epochs in order, and K.

    Raises:
        LabelsError: there are none, or with different K.
    """
    found = {}
    for path in [place, *place.glob("*")]:
        name = re.fullmatch(r"logits_top(\d{1,5})_epoch(\d{1,6})", path.name)
        if name and path.is_dir():
            found[int(name[2])] = (path, int(name[1]))
    if not found:
        raise LabelsError(f"{place} has no folder logits_top<K>_epoch<E>.", code="no-labels")
    widths = {k for _, k in found.values()}
    if len(widths) > 1 or 0 in widths:
        raise LabelsError(f"{place} has labels of different K: {sorted(widths)}.")
    return [found[epoch][0] for epoch in sorted(found)], widths.pop()


def _ranks(epoch: Path) -> list[tuple[Path, Path]]:
    """(keys, values) of each process, in order."""
    numbered = {
        int(m[1]): p for p in epoch.iterdir() if (m := re.fullmatch(r"rank(\d+)-keys.txt", p.name))
    }
    return [(numbered[n], epoch / f"rank{n}-values.bin") for n in sorted(numbered)]


def _match(epochs: list[Path], k: int, folder: ImageFolder) -> tuple[bool, _Records]:
    """Which record of each epoch belongs to which image; are keys names?"""
    named = _named(epochs[0])
    lookup = _Names(folder) if named else _Indices(folder)
    place_EN = scratch_table(len(epochs), len(folder))
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
                fresh[fresh] = place_EN[number, position[fresh]] < 0  # the first one counts
                place_EN[number, position[fresh]] = here[fresh]
                at += len(lines)
            maps.append(_values(binary, k, at - counts[-1]))
            counts.append(at)
        if not maps or counts[-1] == 0:
            raise LabelsError(f"{epoch} has no records.", code="no-labels")
        values.append(maps)
        starts.append(np.array(counts[:-1]))
    listed = tuple(itertools.islice(examples, matching.EXAMPLES))
    return named, _Records(values, starts, place_EN, extra, listed)


def _values(file: Path, k: int, count: int) -> np.ndarray:
    """The records of a process.

    Raises:
        LabelsError: the file is missing, or its length is not that of `count` records.
    """
    length = file.stat().st_size if file.is_file() else 0
    if length != count * record(k).itemsize:
        raise LabelsError(
            f"{file} has {length:,} bytes, and {count:,} keys of K = {k} need "
            f"{count * record(k).itemsize:,}. It was cut off, or K is another.",
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
        raise LabelsError(f"{file} is no list of keys: {error}.", code="broken-labels") from error


def _named(epoch: Path) -> bool:
    """Are keys names of files, or numbers?"""
    first = next((lines for keys, _ in _ranks(epoch) for lines in _lines(keys)), [])
    return not all(key.isascii() and key.isdigit() for key in first)


class _Indices:
    """Keys that are positions in torchvision's ImageFolder."""

    def __init__(self, folder: ImageFolder) -> None:
        index_N = imagefolder.index_of(folder.keys, (r.key for r in folder.rejected))
        self._place = np.full(max(int(index_N.max()) + 1, 1), -1, dtype=np.int64)
        self._place[index_N[index_N >= 0]] = np.flatnonzero(index_N >= 0)

    def positions(self, lines: list[str]) -> np.ndarray:
        """int64: places in the folder of these keys, -1 for none."""
        try:
            index = np.array([int(line) if len(line) < 19 else -1 for line in lines])
        except ValueError as error:
            raise LabelsError(f"a key among numbers that is none: {error}.") from error
        known = (index >= 0) & (index < len(self._place))
        return np.where(known, self._place[np.where(known, index, 0)], -1)


class _Names:
    """Keys that are names of files without their extension; names used twice serve no image."""

    def __init__(self, folder: ImageFolder) -> None:
        names = [matching.stem(key.rsplit("/", 1)[-1]) for key in folder.keys]
        ids = crops.image_ids(names)
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]

    def positions(self, lines: list[str]) -> np.ndarray:
        """int64: places in the folder of these keys, -1 for none."""
        ids = crops.image_ids(lines)
        begin = np.searchsorted(self._sorted, ids, side="left")
        end = np.searchsorted(self._sorted, ids, side="right")
        place = self._order[np.minimum(begin, len(self._order) - 1)]
        return np.where(end - begin == 1, place, -1)


def _fingerprint(epochs: list[Path]) -> str:
    """sha256 (hex) over the beginning of the first epoch's records."""
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
        LabelsError: the crops did not come from TinyViT's seeds, colours were changed, ids go
            beyond int16, or `out` is not empty.
    """
    export = Export(store, settings)
    exporting.refuse_jitter(export, "TinyViT")
    if not export.seeds:
        raise LabelsError(
            f"{store.url}: TinyViT's files keep the seed that a crop was drawn from, not its box, "
            "and only crops that were imported from TinyViT have one. With any other seed its "
            "trainer would cut other boxes than these labels belong to.",
            code="no-seeds",
        )
    refuse_short_ids(export.classes, "TinyViT's format")
    place = exporting.empty_folder(out)
    listed = [str(key) for key in store.images.keys]
    if export.found.crops[0].part.settings.others.get("keys") == "names":
        keys = [matching.stem(key.rsplit("/", 1)[-1]) for key in listed]
    else:
        rejected = (row[0] for row in store.images.rejected)
        keys = [str(index) for index in imagefolder.index_of(listed, rejected).tolist()]
    folders = [place / f"logits_top{export.keep}_epoch{m}" for m in range(export.crops)]
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
        "TinyViT's files keep neither the teacher nor its settings; its trainer must crop with "
        "scale 0.08 to 1, ratio 3/4 to 4/3, bicubic, and add nothing else",
    )
    return Exported(len(export.found.rows), 2 * len(folders), notes)
