"""KDEP's tables 1, 2, 4 and 5 at small scale: pre-train without labels, transfer to other classes.

    python benchmarks/kdep.py [--quick]

Handwritten digits on photographs, as in `fkdpipe demo`. A teacher learns the digits 0 to 5.
Students a quarter as wide are pre-trained on the same images without labels, on the teacher's
stored features, with each alignment and transformation. Baselines are supervised pre-training on
the labels of 0 to 5, with equal crops and with equal time (the time for fitting the basis and for
generation counts as KDEP's), and no pre-training. Each student is then fine-tuned and linearly
probed on the unseen digits 6 to 9, with a few images of each class. Three seeds; the table shows
means.

The last line reports whether the paper's claims hold: KDEP transfers better than random
initialisation and than supervised pre-training with equal budget, also on a fraction of the images;
SVD is the best alignment, and the non-parametric ones beat the 1x1 convolutions; after SVD, PTS and
SM beat no transformation. T and n of PTS are varied around the paper's 0.1 and 3 (table 5).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch

from fkdpipe.commands import demo_data
from fkdpipe.downstream import transfer
from fkdpipe.downstream.transfer import TransferSettings, Trial
from fkdpipe.labelgen import fit_basis, generate, plan
from fkdpipe.labelgen.fit_basis import FitSettings
from fkdpipe.labelgen.generate import Resources
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks import features, teachers
from fkdpipe.networks.models import parse_spec
from fkdpipe.networks.weight_files import EXPORT_NAME
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.store import Store, open_store
from fkdpipe.train import loop, run
from fkdpipe.train.settings import OptimizerSettings, TrainSettings
from fkdpipe.train.state import export

CPU = torch.device("cpu")
CROP = CropDistribution(scale=(0.25, 1.0), flip=0.0)  # a mirrored digit is a different shape
TEACHER = {"channels": [32, 64, 128, 256]}
STUDENT = {"channels": [8, 16, 32, 64]}
SUPERVISED, EQUAL_TIME, RANDOM = "supervised", "supervised, equal time", "random initialisation"
FEW = ", a quarter of the pictures"  # with four times the epochs, for equal numbers of steps
KDEP = {
    "kdep svd + pts": {"alignment": "svd", "transformation": "pts"},
    "kdep svd": {"alignment": "svd", "transformation": "none"},
    "kdep svd + sn": {"alignment": "svd", "transformation": "sn"},
    "kdep svd + sm": {"alignment": "svd", "transformation": "sm"},
    "kdep variance": {"alignment": "variance"},
    "kdep random": {"alignment": "random"},
    "kdep interpolation": {"alignment": "interpolation"},
    "kdep conv-pre": {"alignment": "conv-pre"},
    "kdep conv-post": {"alignment": "conv-post"},
    "kdep svd + pts, n = 2": {"transformation": "pts", "power": 2.0},
    "kdep svd + pts, n = 5": {"transformation": "pts", "power": 5.0},
    "kdep svd + pts, T = 1": {"transformation": "pts", "temperature": 1.0},
}


@dataclass(frozen=True)
class Size:
    """Scale of the experiment.

    Attributes:
        scans: number of images, None for all 1,797.
        fraction: share of the new classes' images used for transfer.
    """

    scans: int | None
    teacher_epochs: int
    epochs: int
    transfer_epochs: int
    fraction: float
    seeds: tuple[int, ...]


FULL = Size(None, 30, 20, 30, 0.1, (0, 1, 2))
QUICK = Size(200, 4, 4, 3, 0.5, (0,))


def make_folders(root: Path, size: Size) -> tuple[Path, Path]:
    """(folder of 0 to 5, folder of 6 to 9), each with train/ and val/."""
    demo_data.make_images(root / "all", count=size.scans)
    for name, digits in (("old", range(6)), ("new", range(6, 10))):
        for split in ("train", "val"):
            (root / name / split).mkdir(parents=True)
            for digit in digits:
                target = root / "all" / split / str(digit)
                (root / name / split / str(digit)).symlink_to(target)
    return root / "old", root / "new"


def settings(options: dict[str, Any], epochs: int, seed: int, **changes: Any) -> TrainSettings:
    return TrainSettings(
        student="resnet10t", target="ground-truth", student_options=options, size=32,
        epochs=epochs, seed=seed,
        batch_size=64, crops_per_image=4, crop=CROP, threads=1, eval_every=epochs,
        optimizer=OptimizerSettings(name="adamw", lr=0.003), **changes,
    )  # fmt: skip


def train(root: Path, data: Path, store: Store | None, wanted: TrainSettings) -> float:
    """Train a student in the run folder `root`; return the seconds."""
    prepared = run.prepare(
        wanted, data, root, store=store, cache_dir=root.parent / "cache", device=CPU
    )
    begun = time.perf_counter()
    loop.train(prepared)
    return time.perf_counter() - begun


def make_store(root: Path, data: Path, teacher: str, size: Size) -> tuple[Store, Path, float]:
    """(store of features, basis, seconds to produce both)."""
    begun = time.perf_counter()
    wanted = FitSettings(teacher=teacher, fraction=1.0, crops=2, crop=CROP)
    (loaded,) = teachers.load_teachers(
        [parse_spec(teacher)],
        class_names=(),
        device=CPU,
        needs=GenerateSettings(teacher=("t",), form="none", features=("pre", "post")).needs,
    )
    resources = Resources(device=CPU, threads=1)
    sample = fit_basis.from_folder(data, wanted)
    fitted = fit_basis.fit(sample, loaded, wanted, resources)
    features.save_basis(root / "basis.safetensors", fitted.basis)
    ratios = features.std_ratios(fitted.basis, STUDENT["channels"][-1])
    common.say(f"Std Ratio: {', '.join(f'{k} {v:.1f}' for k, v in ratios.items())}")
    generation = GenerateSettings(
        teacher=(teacher,),
        form="none",
        features=("pre", "post"),
        crops=size.epochs,
        crop=CROP,
    )
    location = LocalLocation(root / "store")
    planned = plan.prepare(location, data, generation, [loaded], device=CPU)
    generate.generate(planned, [loaded], resources)
    return open_store(root / "store"), root / "basis.safetensors", time.perf_counter() - begun


def experiment(root: Path, size: Size) -> list[dict[str, Any]]:
    old, new = make_folders(root, size)
    seconds = train(root / "teacher", old, None, settings(TEACHER, size.teacher_epochs, 0))
    common.say(f"teacher: {seconds:.0f} s")
    store, basis, making = make_store(root, old, str(root / "teacher"), size)
    common.say(f"basis and features: {making:.0f} s")
    rows = []
    for seed in size.seeds:
        rows += one_seed(root / f"seed{seed}", old, new, store, basis, making, size, seed)
    return rows


def one_seed(
    root: Path,
    old: Path,
    new: Path,
    store: Store,
    basis: Path,
    making: float,
    size: Size,
    seed: int,
) -> list[dict[str, Any]]:
    """Run and transfer every pre-training with one seed; a row for each mode and learning rate."""
    rows: list[dict[str, Any]] = []

    def row(name: str, model: str, pretrain_s: float) -> None:
        trials = transferred(root / name / "transfer", model, new, size, seed)
        for trial in trials:
            facts = {"pretraining": name, "seed": seed, "pretrain_s": pretrain_s}
            rows.append({**facts, "mode": trial.mode, "lr": trial.lr, "top1": trial.top1})
        common.say(f"seed {seed}, {name}: {', '.join(f'{trial.top1:.1f}' for trial in trials)}")

    few = {"fraction": 0.25}
    for name, options in KDEP.items():
        method = {"name": "kdep", "basis": str(basis), "seed": seed, **options}
        spent = train(root / name, old, store, settings(STUDENT, size.epochs, seed, method=method))
        row(name, str(root / name), making + spent)
    method = {"name": "kdep", "basis": str(basis), "seed": seed}
    for name, changes in (("kdep svd + pts" + FEW, {"method": method}), (SUPERVISED + FEW, {})):
        wanted = settings(STUDENT, 4 * size.epochs, seed, **few, **changes)
        row(name, str(root / name), train(root / name, old, store, wanted))
    wanted = settings(STUDENT, size.epochs, seed)
    alone = train(root / SUPERVISED, old, store, wanted)
    row(SUPERVISED, str(root / SUPERVISED), alone)
    longer = round(size.epochs * rows[0]["pretrain_s"] / alone)
    spent = train(root / EQUAL_TIME, old, None, settings(STUDENT, longer, seed))
    row(EQUAL_TIME, str(root / EQUAL_TIME), spent)
    row(RANDOM, untrained(root / RANDOM, old, seed), 0.0)
    return rows


def untrained(root: Path, data: Path, seed: int) -> str:
    """Export a student with random weights."""
    prepared = run.prepare(
        settings(STUDENT, 4, seed), data, root, cache_dir=root.parent / "cache", device=CPU
    )
    export(prepared, EXPORT_NAME)
    return str(root)


def transferred(root: Path, model: str, data: Path, size: Size, seed: int) -> list[Trial]:
    """Trials on the new classes, for both modes and two learning rates."""
    wanted = TransferSettings(
        lr=(0.03, 0.01), seeds=(seed,), epochs=size.transfer_epochs, batch_size=32, size=32,
        crop=CROP, threads=1, fraction=size.fraction,
    )  # fmt: skip
    return transfer.transfer(model, [data], root, wanted, device=CPU)


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each pre-training: mean and standard deviation at the better learning rate."""
    table = []
    for name in dict.fromkeys(row["pretraining"] for row in rows):
        same = [row for row in rows if row["pretraining"] == name]
        trials = [
            Trial("", row["mode"], row["lr"], row["seed"], row["top1"], float("nan"))
            for row in same
        ]
        line: dict[str, Any] = {"pretraining": name}
        for best in transfer.summarise(trials):
            field = best.mode.replace("-", "_")
            line |= {field: best.top1, f"{field}_std": best.std}
        line["pretrain_s"] = statistics.mean(row["pretrain_s"] for row in same)
        table.append(line)
    return table


def trends(table: list[dict[str, Any]], mode: str) -> dict[str, bool]:
    """Whether each claim of the paper holds for the means."""
    top1 = {line["pretraining"]: line[mode] for line in table}
    best, plain = top1["kdep svd + pts"], top1["kdep svd"]
    selections = [top1[f"kdep {name}"] for name in ("variance", "random", "interpolation")]
    convolutions = [top1["kdep conv-pre"], top1["kdep conv-post"]]
    return {
        "kdep_above_random": best > top1[RANDOM],
        "kdep_above_supervised": best > top1[SUPERVISED],
        "kdep_above_supervised_of_equal_time": best > top1[EQUAL_TIME],
        "pts_above_none": best > plain,
        "sm_above_none": top1["kdep svd + sm"] > plain,
        "svd_above_other_alignments": plain > max(*selections, *convolutions),
        "selections_above_convolutions": min(selections) > max(convolutions),
        "kdep_above_supervised_on_few_pictures": top1["kdep svd + pts" + FEW]
        > top1[SUPERVISED + FEW],
    }


def main() -> None:
    arguments = common.arguments(__doc__)
    torch.set_num_threads(1)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fkdpipe-kdep-") as root:
        rows = experiment(Path(root), QUICK if arguments.quick else FULL)
    table = means(rows)
    common.table(table)
    figures = {
        "rows": table,
        "trends": {mode: trends(table, mode) for mode in ("fine_tune", "probe")},
        "seconds": round(time.perf_counter() - begun),
    }
    common.finish("kdep", rows, figures, quick=arguments.quick)


if __name__ == "__main__":
    main()
