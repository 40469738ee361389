"""Made the stores in this folder, with the code of commit 474340d (2026-11-25). Later code reads
them and does not make them again: run from a checkout of that commit,

    PYTHONPATH=. python .../store-v1/make.py .../store-v1 WORK
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import timm
import torch
import zarr
from fkdpipe.crops import CropLaw, Jitter
from fkdpipe.models import ModelSpec
from fkdpipe.taps import needs_of
from fkdpipe.teachers import load_teachers
from PIL import Image

from fkdpipe import features, images, weight_files
from fkdpipe.interchange import importing, open_labels
from fkdpipe.interchange.source import ImportSettings
from fkdpipe.labelgen import fit_basis, generate, plan
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.storage import rounds, schema
from fkdpipe.storage.location import open_location
from fkdpipe.storage.store import open_store

CLASSES = ("ash", "beech", "cedar", "date palm", "élm", "fir")
CPU = torch.device("cpu")


def make_images(root: Path) -> None:
    """Smooth colours, so that JPEG keeps them small."""
    random = np.random.default_rng(0)
    for name in CLASSES:
        (root / "train" / name).mkdir(parents=True)
        for k in range(2):
            height, width = (int(n) for n in random.integers(36, 60, 2))
            coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(root / "train" / name / f"{k}.jpg", quality=85)


def load(file: Path, seed: int) -> list:
    torch.manual_seed(seed)
    module = timm.create_model("test_convnext", num_classes=len(CLASSES)).eval()
    with torch.no_grad():
        module.get_classifier().weight.mul_(40)
    facts = {"student": "test_convnext", "size": [32, 32], "interpolation": "bilinear"}
    weight_files.write_export(file, module, facts)
    spec = ModelSpec("test_convnext", "timm", file)
    return load_teachers([spec], class_names=CLASSES, device=CPU, needs=needs_of({"pre", "post"}))


def make(place: Path, data: Path, teachers: list, **settings) -> None:
    wanted = GenerateSettings(teacher=("test_convnext",), **settings)
    planned = plan.prepare(open_location(place), data, wanted, teachers, device=CPU)
    generate.generate(planned, teachers, generate.Resources(device=CPU, batch=16, threads=1))


def import_fkd(place: Path, data: Path, work: Path) -> None:
    """FKD's files, one per image: fractions of the image, flips, (classes, probabilities)."""
    random = np.random.default_rng(1)
    folder = images.scan(data)
    for key, (height, width) in zip(folder.keys, folder.size_N2.tolist(), strict=True):
        box = np.array([[1, 2, height - 3, width - 4], [0, 0, height, width // 2]])
        ids = np.stack([random.permutation(len(CLASSES))[:2] for _ in range(2)])
        label = np.stack([ids, np.tile([0.75, 0.125], (2, 1))], axis=1)
        state = [
            (box / [height, width, height, width]).astype(np.float32),
            np.array([True, False]),
            label.astype(np.float32),
        ]
        file = work / "train" / f"{key.rsplit('.', 1)[0]}.tar"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file)
    settings = ImportSettings()
    source = open_labels("fkd", work, folder, settings)
    importing.import_labels(source, folder, open_location(place), settings)


def record(place: Path, file: Path) -> None:
    """What plain zarr reads, and the crops that are derived."""
    store = open_store(place)
    values = {}
    for part in store.parts.values():
        for field in part.fields:
            path = f"{part.path}/{field.name}"
            array = np.asarray(zarr.open_array(store=str(place), path=path, mode="r")[...])
            values[path] = np.array(array.tolist(), str) if array.dtype.kind in "OT" else array
        if part.kind == "crops" and not part.fields:
            units = range(store.num_units)
            drawn = [rounds.values_of(rounds.crops_of(store, part, unit)) for unit in units]
            for name in drawn[0]:
                values[f"{part.path}/{name}"] = np.concatenate([unit[name] for unit in drawn])
    np.savez_compressed(file, **values)


def main() -> None:
    out, work = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    schema.unit_images = lambda bytes_per_image: 8  # two units, the second one short
    data = out / "images"
    make_images(data)
    teachers = load(work / "teacher.safetensors", 0)
    stored = out / "stored"
    for crops in (5, 7):  # two rounds: a crop group and a crop, then two crops
        make(
            stored, data, teachers, source="sparse", form="topk:5", features=("post",), crops=crops
        )
    make(stored, data, teachers, source="full", form="full")
    settings = fit_basis.FitSettings(teacher="test_convnext", tap="pre", images="100%", crops=2)
    sample = fit_basis.from_store(open_store(stored), data, settings)
    resources = generate.Resources(device=CPU, batch=16, threads=1)
    fitted = fit_basis.fit(sample, teachers[0], settings, resources)
    basis = out / "basis.safetensors"
    features.save_basis(basis, fitted.basis)
    law = CropLaw(scale=(0.2, 1.0), jitter=Jitter(brightness=0.4, hue=0.1))
    derived = {"crops": 4, "crop": law, "seed": 7, "boxes": "derived"}
    make(out / "derived", data, teachers, source="compact", form="topk:3:compact", **derived)
    make(
        out / "derived", data, teachers, source="logits", form="logits", features=("pre:4",),
        features_code="int8", basis=basis,
    )  # fmt: skip
    make(out / "derived", data, teachers, source="hard", form="hard")
    import_fkd(out / "imported", data, work / "fkd")
    for name in ("stored", "derived", "imported"):
        record(out / name, out / f"{name}.npz")


main()
