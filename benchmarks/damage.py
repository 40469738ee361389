"""Damage in a store or its cache: does a full verify find it, and is it ever served?

A small store is generated with the public command (top-5 and full labels, four units or more), its
cache is filled as in training, and then one thing at a time is damaged and restored:

    flip        a random bit of store or cache is flipped
    truncate    a random file is truncated at a random position
    delete      a random file is deleted
    swap        two files of the same kind are swapped, within the store or with a second store
                generated from other seeds
    swap cache  a whole cache folder is replaced by another one
    forge       a commit record is replaced: by that of another unit or of the other store, or by a
                new one with correct checksums of wrong files

found: `storage.verify` with the cache reports it (opening the store may already refuse it).
served: a reader, opened as the trainer opens it, hands out a box, a flip, a label or an image name
that differs from that of the intact store. A sample is repaired with `generate --repair` and
compared byte for byte.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import small
import torch
from small import Bench

from fkdpipe.common.errors import FkdpipeError
from fkdpipe.labelgen import generate, plan, repair
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks.teachers import Teacher, load_teachers
from fkdpipe.storage import commits, labels, reader, schema, verify
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.store import open_store

Undo = Callable[[], None]
SPARSE, WIDE = "t", "w"
TARGET = labels.Target("marginal-smoothing", 5)


def settings(source: str, form: str, seed: int) -> GenerateSettings:
    return GenerateSettings(
        teacher=("test_resnet",), source=source, form=form, crops=small.CROPS, seed=seed
    )


def make(store_path: Path, bench: Bench, teacher: Teacher, seed: int) -> None:
    """Generate both sources of a store, using the library calls of `fkdpipe generate`."""
    for source, form in ((SPARSE, "topk:5"), (WIDE, "full")):
        run(store_path, bench, teacher, settings(source, form, seed))


def run(
    store_path: Path,
    bench: Bench,
    teacher: Teacher,
    wanted: GenerateSettings,
    restored: repair.Restored | None = None,
) -> None:
    cpu = torch.device("cpu")
    made = plan.prepare(LocalLocation(store_path), bench.data, wanted, [teacher], device=cpu)
    batch_of = repair.withdraw(made, restored).batch_of if restored is not None else {}
    resources = generate.Resources(device=cpu, batch=16, threads=1, batch_of=batch_of)
    generate.generate(made, [teacher], resources)


def served(store_path: Path, cache_dir: Path) -> list[np.ndarray]:
    """All data that a trainer could read from a store.

    Raises:
        FkdpipeError: the store or its cache is rejected.
    """
    store = open_store(store_path)
    found = reader.finished(store, [("labels", SPARSE, ""), ("labels", WIDE, "")])
    rows, crops_m = np.arange(store.num_images), np.arange(small.CROPS)
    boxes = reader.CropReader(store, found.crops, cache_dir).take(rows, crops_m)
    sparse = reader.SparseReader(store, found.labels[0], cache_dir).take(rows, crops_m, TARGET)
    wide = reader.WideReader(store, found.labels[1], "log_prob")
    scores = [wide.unit(unit, crops_m) for unit in range(store.num_units)]
    listed = store.images
    names = [listed.keys.astype(str), listed.class_N, listed.size_N2, np.array(listed.class_names)]
    recorded = [boxes.box_NM4, boxes.flip_NM]
    return [
        *recorded,
        sparse.ids_BK,
        sparse.prob_BK,
        sparse.rest_B,
        *scores,
        *names,
        found.rows,
    ]


class Field:
    """A store, its cache and a second store, as lists of files to damage."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.store, self.other = root / "store", root / "other"
        self.cache, self.other_cache = root / "cache", root / "other-cache"
        self.chance = chance
        folders = (self.store, self.cache)
        self.files = [f for folder in folders for f in sorted(folder.rglob("*")) if _matters(f)]
        self.lengths = [f.stat().st_size for f in self.files]

    def flip(self) -> Undo:
        (file,) = self.chance.choices(self.files, self.lengths)
        data = file.read_bytes()
        position, bit = self.chance.randrange(len(data)), 1 << self.chance.randrange(8)
        file.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
        return lambda: _write(file, data)

    def truncate(self) -> Undo:
        file = self.chance.choice(self.files)
        data = file.read_bytes()
        file.write_bytes(data[: self.chance.randrange(len(data))])
        return lambda: _write(file, data)

    def delete(self) -> Undo:
        file = self.chance.choice(self.files)
        data = file.read_bytes()
        file.unlink()
        return lambda: _write(file, data)

    def swap(self) -> Undo:
        """Swap two different files of the same kind."""
        while True:
            first = self.chance.choice(self.files)
            second = self.chance.choice(self._alike(first))
            a, b = first.read_bytes(), second.read_bytes()
            if a != b:
                break
        first.write_bytes(b)
        second.write_bytes(a)

        def undo() -> None:
            first.write_bytes(a)
            second.write_bytes(b)

        return undo

    def _alike(self, file: Path) -> list[Path]:
        """Files of the same kind: same name up to numbers, in both stores or both caches."""
        if self.cache in file.parents:
            every = [*self.cache.rglob(file.name), *self.other_cache.rglob(file.name)]
        else:
            kind = _kind(file.relative_to(self.store))
            every = [
                f for s in (self.store, self.other) for f in s.rglob("*")
                if f.is_file() and _kind(f.relative_to(s)) == kind
            ]  # fmt: skip
        return every

    def swap_cache(self) -> Undo:
        """Replace a cache folder by another one, of the same or of the other store."""
        mine = self.chance.choice(sorted(p for p in self.cache.iterdir() if p.is_dir()))
        others = [p for c in (self.cache, self.other_cache) for p in c.iterdir() if p.is_dir()]
        other = self.chance.choice(sorted(p for p in others if p != mine))
        kept = mine.with_name("kept")
        mine.rename(kept)
        shutil.copytree(other, mine)

        def undo() -> None:
            shutil.rmtree(mine)
            kept.rename(mine)

        return undo

    def forge(self) -> Undo:
        """Replace a commit record by a different one with a correct checksum."""
        markers = [f for f in self.files if f.stem.isdigit() and "commits" in f.parts]
        file = self.chance.choice(markers)
        data = file.read_bytes()
        marker = commits.marker_from(data)
        wrong = {key: (length, "00000000") for key, (length, _) in marker.files.items()}
        forged = [
            replace(marker, files=wrong),
            replace(marker, files={}, failed={}, facts={}),
            replace(marker, failed={marker.unit: ("forged", "left out by nobody")}),
        ]
        others = [f for f in self._alike(file) if f.read_bytes() != data]
        made = [m.to_bytes() for m in forged] + [f.read_bytes() for f in others]
        forgery = self.chance.choice([m for m in made if m != data])
        file.write_bytes(forgery)
        return lambda: _write(file, data)


def _matters(file: Path) -> bool:
    return file.is_file() and not file.name.endswith(".lock") and file.stat().st_size > 0


def _kind(path: Path) -> str:
    words = ["#" if word.removesuffix(".json").isdigit() else word for word in path.parts]
    return "/".join(words)


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def is_found(store_path: Path, cache_dir: Path) -> bool:
    try:
        return bool(verify.verify(open_store(store_path), full=True, cache_dir=cache_dir))
    except FkdpipeError:
        return True


def is_served(store_path: Path, cache_dir: Path, truth: list[np.ndarray], scratch: Path) -> bool:
    """Whether a trainer reads wrong data. It may rebuild a broken cache."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(cache_dir, scratch)
    try:
        values = served(store_path, scratch)
    except FkdpipeError:
        return False
    same = len(values) == len(truth) and all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(values, truth, strict=True)
    )
    return not same


def trials(field: Field, budget: dict[str, int]) -> Iterator[tuple[str, Undo]]:
    for name, count in budget.items():
        for _ in range(count):
            yield name, getattr(field, name)()


def repair_some(
    root: Path, bench: Bench, teacher: Teacher, field: Field, count: int
) -> tuple[int, int]:
    """Damage the store and repair it; return (attempts, repairs identical to the byte)."""
    whole = contents(field.store)
    same = 0
    done = 0
    while done < count:
        undo = getattr(field, field.chance.choice(["flip", "truncate", "delete", "forge"]))()
        if contents(field.store) == whole:  # it hit the cache
            undo()
            continue
        done += 1
        restored = repair.restore(LocalLocation(field.store), bench.data)
        for source, form in ((SPARSE, "topk:5"), (WIDE, "full")):
            run(field.store, bench, teacher, settings(source, form, 0), restored)
        same += contents(field.store) == whole
        shutil.rmtree(field.store)
        for key, data in whole.items():
            _write(field.store / key, data)
    return done, same


def contents(store: Path) -> dict[str, bytes]:
    return {
        file.relative_to(store).as_posix(): file.read_bytes()
        for file in store.rglob("*")
        if file.is_file()
    }


def main() -> None:
    options = common.arguments(__doc__)
    torch.set_num_threads(1)
    budget = {
        "flip": 1000,
        "truncate": 150,
        "delete": 100,
        "swap": 150,
        "swap_cache": 10,
        "forge": 60,
    }
    images, repairs = 40, 25
    if options.quick:
        budget = {"flip": 30, "truncate": 8, "delete": 8, "swap": 8, "swap_cache": 4, "forge": 6}
        images, repairs = 16, 3
    schema.UNIT_IMAGES = 8
    injected: Counter[str] = Counter()
    found: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fkdpipe-damage-") as folder:
        root = Path(folder)
        bench = small.prepare(root, images=images)
        spec = small.ModelSpec("test_resnet", "timm", bench.teacher)
        (teacher,) = load_teachers(
            [spec], class_names=[str(k) for k in range(10)], device=torch.device("cpu")
        )
        for name, seed in (("store", 0), ("other", 1)):
            make(root / name, bench, teacher, seed)
            truth = served(root / name, root / ("cache" if name == "store" else "other-cache"))
            if name == "store":
                expected = truth
        field = Field(root, random.Random(0))
        for done, (name, undo) in enumerate(trials(field, budget), start=1):
            injected[name] += 1
            if is_found(field.store, field.cache):
                found[name] += 1
            else:
                common.say(f"not found: {name}")
            if is_served(field.store, field.cache, expected, root / "scratch"):
                wrong[name] += 1
                common.say(f"served: {name}")
            undo()
            if done % 100 == 0:
                common.say(f"{done} of {sum(budget.values())}")
        assert not verify.verify(open_store(field.store), full=True, cache_dir=field.cache)
        repaired, same = repair_some(root, bench, teacher, field, repairs)
    rows: list[dict[str, Any]] = [
        {"damage": name, "injected": injected[name], "found": found[name], "served": wrong[name]}
        for name in budget
    ]
    rows.append({"damage": "repaired", "injected": repaired, "identical": same})
    figures = {
        "injected": injected.total(),
        "found": found.total(),
        "served": wrong.total(),
        "repaired": repaired,
        "repaired_identical": same,
    }
    common.finish("damage", rows, figures, quick=options.quick)


if __name__ == "__main__":
    main()
