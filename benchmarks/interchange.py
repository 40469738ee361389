"""Import and export of label files: speed, memory by number of files, round trips.

The script writes label files for synthetic images (only names and sizes; no pixels are needed),
imports them into a store and exports them again. Baselines: `torch.load` of the same files, as in
the loaders of the other systems, and `torch.save`. Memory is the increase of this process's peak
during the import, for a small set of files and one six times as large.

Usage: python benchmarks/interchange.py [--quick]
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch

from fkdpipe.interchange import EXPORTS, IMPORTS, importing
from fkdpipe.interchange.exporting import ExportSettings
from fkdpipe.interchange.source import ImportSettings
from fkdpipe.pixels.images import ImageFolder
from fkdpipe.storage.location import open_location
from fkdpipe.storage.store import Store, open_store

CLASSES, PER_CLASS = 1000, 64
MAP_CROPS = 10  # drawn per label map
SIZE = (375, 500)


def folder_of(count: int) -> ImageFolder:
    """A list of images as returned by a scan, without any files."""
    keys = [f"n{i // PER_CLASS:04}/i{i:07}.JPEG" for i in range(count)]
    return ImageFolder(
        root=Path("images"),
        class_names=tuple(sorted({key.split("/")[0] for key in keys})),
        keys=tuple(keys),
        class_N=np.arange(count, dtype=np.int32) // PER_CLASS,
        size_N2=np.tile(np.array(SIZE, dtype=np.uint16), (count, 1)),
        bytes_N=np.arange(count, dtype=np.int64) + 1,
        rejected=(),
    )


def label(random: np.random.Generator, crops: int, k: int) -> list[torch.Tensor]:
    """Crops and labels of one image in FKD's format."""
    H, W = SIZE
    h, w = random.integers(30, H + 1, crops), random.integers(30, W + 1, crops)
    top, left = ((random.random(crops) * (n - m + 1)).astype(int) for n, m in ((H, h), (W, w)))
    box = np.stack([top / H, left / W, h / H, w / W], axis=1)
    ids = (random.integers(0, CLASSES, (crops, 1)) + random.permutation(CLASSES)[:k]) % CLASSES
    prob = -np.sort(-random.dirichlet(np.full(k, 0.3), crops), axis=1) * 0.95
    pair = np.stack([ids, prob], axis=1)
    return [
        torch.from_numpy(box).float(),
        torch.from_numpy(random.random(crops) < 0.5),
        torch.from_numpy(pair).float(),
    ]


def write_fkd(workdir: Path, folder: ImageFolder, crops: int, *, tensors: bool) -> None:
    random = np.random.default_rng(0)
    state = [label(random, crops, 5) for _ in range(64)]
    for i, key in enumerate(folder.keys):
        path = workdir / "train" / key.replace(".JPEG", ".tar")
        path.parent.mkdir(parents=True, exist_ok=True)
        values = state[i % 64]
        torch.save(values if tensors else [v.numpy() for v in values], path)


def write_maps(workdir: Path, folder: ImageFolder) -> None:
    random = np.random.default_rng(0)
    ids = random.random((CLASSES, 15, 15)).argsort(0)[:5]
    scores = -np.sort(-random.normal(8, 3, (5, 15, 15)), axis=0)
    values = torch.from_numpy(np.stack([scores, ids])).float()
    for key in folder.keys:
        path = workdir / key.replace(".JPEG", ".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(values, path)


def write_tinyvit(workdir: Path, folder: ImageFolder, crops: int, k: int = 10) -> None:
    random = np.random.default_rng(0)
    kind = np.dtype([("seed", "<i4"), ("index", "<i2", (k,)), ("prob", "<f2", (k,))])
    for epoch in range(crops):
        inside = workdir / f"logits_top{k}_epoch{epoch}"
        inside.mkdir(parents=True)
        records = np.zeros(len(folder), dtype=kind)
        records["seed"] = random.integers(0, 2**31, len(folder))
        records["index"] = np.arange(k)
        records["prob"] = 0.09
        (inside / "rank0-keys.txt").write_text("".join(f"{i}\n" for i in range(len(folder))))
        (inside / "rank0-values.bin").write_bytes(records.tobytes())


def bring(name: str, workdir: Path, folder: ImageFolder, store: Path, **settings) -> float:
    """Seconds of an import."""
    shutil.rmtree(store, ignore_errors=True)
    wanted = ImportSettings(classes=CLASSES, **settings)
    begun = time.perf_counter()
    opened = IMPORTS[name](workdir, folder, wanted)
    result = importing.import_labels(opened, folder, open_location(store), wanted)
    assert not result.failed
    return time.perf_counter() - begun


def send(name: str, store: Store, out: Path) -> float:
    """Seconds of an export."""
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    EXPORTS[name](store, out, ExportSettings())
    return time.perf_counter() - begun


def load_all(files: list[Path]) -> float:
    """Seconds to torch.load every file once."""
    begun = time.perf_counter()
    for file in files:
        torch.load(file, weights_only=False)
    return time.perf_counter() - begun


def save_all(values: list[torch.Tensor], count: int, out: Path) -> float:
    """Seconds to torch.save the number of files that an export writes."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    begun = time.perf_counter()
    for i in range(count):
        torch.save(values, out / f"{i}.tar")
    return time.perf_counter() - begun


def growth_mb(work: Callable[[], object]) -> float:
    """Increase of the peak resident set, in MB."""
    before = common.resident_bytes()
    common.reset_peak()
    peak = common.peak_bytes()
    work()
    return (common.peak_bytes() - max(before, peak)) / 1e6


def rate_row(name: str, count: int, crops: int, seconds: list[float]) -> dict:
    middle = float(np.median(seconds))
    return {
        "what": name,
        "images": count,
        "crops": crops,
        "images_per_s": count / middle,
        "crops_per_s": count * crops / middle,
        "imagenet_minutes": 1_281_167 / (count / middle) / 60,
    }


def main() -> None:
    quick = common.arguments(__doc__).quick
    torch.set_num_threads(1)
    count, crops, rounds = (256, 20, 1) if quick else (1024, 100, 3)
    folder = folder_of(count)
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as text:
        workdir = Path(text)
        common.say(f"writing label files for {count} images x {crops} crops")
        write_fkd(workdir / "numpy", folder, crops, tensors=False)
        write_fkd(workdir / "tensors", folder, crops, tensors=True)
        write_maps(workdir / "maps", folder)
        write_tinyvit(workdir / "tinyvit", folder, crops)
        store = workdir / "store"
        bring("fkd", workdir / "tensors", folder, workdir / "kept")
        send("ml-dr", open_store(workdir / "kept"), workdir / "mldr")
        files = {n: sorted((workdir / n).rglob("*.tar")) for n in ("numpy", "tensors", "mldr")}
        values = label(np.random.default_rng(0), crops, 5)
        kept = open_store(workdir / "kept")
        common.say("measuring")
        times = common.interleaved(
            rounds,
            fkd_numpy=lambda: bring("fkd", workdir / "numpy", folder, store),
            fkd_numpy_torch_load=lambda: load_all(files["numpy"]),
            fkd_tensors=lambda: bring("fkd", workdir / "tensors", folder, store),
            fkd_tensors_torch_load=lambda: load_all(files["tensors"]),
            mldr=lambda: bring("ml-dr", workdir / "mldr", folder, store),
            mldr_torch_load=lambda: load_all(files["mldr"]),
            tinyvit=lambda: bring("tinyvit", workdir / "tinyvit", folder, store, assume_plain=True),
            relabel=lambda: bring("relabel", workdir / "maps", folder, store, crops=MAP_CROPS),
            export_fkd=lambda: send("fkd", kept, workdir / "out"),
            export_torch_save=lambda: save_all(values, count, workdir / "out"),
            export_mldr=lambda: send("ml-dr", kept, workdir / "out"),
            export_parquet=lambda: send("parquet", kept, workdir / "out"),
        )
        drawn = {"relabel": MAP_CROPS}
        rows += [rate_row(name, count, drawn.get(name, crops), t) for name, t in times.items()]
        figures = {
            f"{ours}_vs_{base}": round(common.median_ratio(times[theirs], times[ours]), 3)
            for ours, base, theirs in (
                ("fkd_numpy", "torch_load", "fkd_numpy_torch_load"),
                ("fkd_tensors", "torch_load", "fkd_tensors_torch_load"),
                ("mldr", "torch_load", "mldr_torch_load"),
                ("export_fkd", "torch_save", "export_torch_save"),
            )
        }
        for name in ("numpy", "tensors", "mldr", "maps", "tinyvit", "out"):
            shutil.rmtree(workdir / name)
        figures |= memory(workdir, count, rows)
    common.finish("interchange", rows, figures, quick=quick)


def memory(workdir: Path, count: int, rows: list[dict]) -> dict[str, float]:
    """Peak memory of importing a few small files, and six times as many."""
    found = {}
    small, large = folder_of(4 * count), folder_of(24 * count)
    for name, folder in (("small", small), ("large", large)):
        labels, keep = workdir / f"labels-{name}", workdir / name
        write_fkd(labels, folder, 2, tensors=True)
        found[name] = growth_mb(lambda p=labels, f=folder, k=keep: bring("fkd", p, f, k))
        rows.append({"what": f"peak memory, {name}", "images": len(folder), "crops": 2,
                     "growth_mb": found[name]})  # fmt: skip
    per_image = (found["large"] - found["small"]) * 1e6 / (len(large) - len(small))
    return {
        "growth_mb_small": round(found["small"], 1),
        "growth_mb_large": round(found["large"], 1),
        "images_small": len(small),
        "images_large": len(large),
        "growth_bytes_per_image": round(per_image, 1),
    }


if __name__ == "__main__":
    main()
