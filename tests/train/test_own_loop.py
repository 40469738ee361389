"""A loop of one's own over LabelledCrops learns what `fkdpipe train` learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pipeline import train
from sklearn.datasets import load_digits
from timm.data import resolve_model_data_config
from torch.nn.functional import cross_entropy

from fkdpipe import LabelledCrops, evaluate, generate, load_teacher
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage.store import open_store
from fkdpipe.train.settings import OptimizerSettings

EPOCHS, M, BATCH, LR = 8, 2, 32, 0.01
TARGET = "marginal-smoothing:5"
SEEDS = (0, 1, 2)
UPRIGHT = CropDistribution(scale=(0.4, 1.0), flip=0.0)  # a mirrored digit is another shape


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's scans of digits as images, and a store of a small teacher's labels."""
    root = tmp_path_factory.mktemp("digits")
    scans = load_digits()
    for index, (scan, digit) in enumerate(zip(scans.images[:300], scans.target, strict=False)):
        folder = root / "images" / ("val" if index % 5 == 0 else "train") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((scan * (255 / 16)).astype(np.uint8)).resize((40, 40))
        image.save(folder / f"{index}.png")
    with_trainer(root, "teacher", store=None, target="ground-truth", seed=9)
    images, store, teacher = (root / name for name in ("images", "store", "teacher"))
    generate(images, store, teacher=str(teacher), form="topk:5", crops=EPOCHS, crop=UPRIGHT)
    return root


def with_trainer(root: Path, out: str, *, seed: int, store: Path | None, target: str) -> float:
    outcome = train(
        root / out,
        root / "images",
        None if store is None else open_store(store),
        target=target,
        epochs=EPOCHS,
        eval_every=EPOCHS,
        batch_size=BATCH,
        crops_per_image=M,
        seed=seed,
        **({"crop": UPRIGHT} if store is None else {}),
        optimizer=OptimizerSettings(name="adamw", lr=LR),
    )
    assert outcome.top1 is not None
    return outcome.top1


def with_a_loop(root: Path, *, seed: int) -> float:
    torch.manual_seed(seed)
    student = timm.create_model("test_resnet", num_classes=10)
    config = resolve_model_data_config(student)
    crops = LabelledCrops(
        root / "store",
        root / "images",
        target=TARGET,
        size=32,
        batch_size=BATCH,
        crops_per_image=M,
        seed=seed,
        **{name: config[name] for name in ("mean", "std", "interpolation")},
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS // M)
    for _ in range(EPOCHS // M):
        for batch in crops:
            loss = cross_entropy(student(batch.pixels), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return evaluate(load_teacher(student, size=32), root / "images").top1


@pytest.mark.slow
def test_its_accuracy_is_the_trainers_within_the_spread(digits):
    ours = [with_a_loop(digits, seed=seed) for seed in SEEDS]
    theirs = [
        with_trainer(digits, f"run{seed}", seed=seed, store=digits / "store", target=TARGET)
        for seed in SEEDS
    ]
    print("own loop", ours, "fkdpipe train", theirs)
    assert min(ours + theirs) > 50  # of ten classes: both have learnt
    spread = max(theirs) - min(theirs) + 100 / 60  # one image of the held-out
    assert abs(np.mean(ours) - np.mean(theirs)) <= spread
