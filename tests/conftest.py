"""Fixtures shared by all tests: small real pictures, a tiny teacher, temporary directories."""

from __future__ import annotations

import logging
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: threads would only wait

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from fkdpipe.networks import models, teachers, weight_files
from fkdpipe.networks.models import ModelSpec
from fkdpipe.pixels import images
from fkdpipe.pixels.replay import normalise

CLASSES = ("ash", "beech", "cedar", "date palm", "élm")


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """scikit-learn's two photographs, uint8 (427, 640, 3)."""
    return list(load_sample_images().images)


@pytest.fixture(scope="session")
def cut(photographs) -> Callable[[int, int, int], Image.Image]:
    """cut(seed, height, width): a piece of a photograph, never symmetric."""

    def make(seed: int, height: int, width: int) -> Image.Image:
        random = np.random.default_rng(seed)
        photograph = photographs[seed % 2]
        top = int(random.integers(photograph.shape[0] - height + 1))
        left = int(random.integers(photograph.shape[1] - width + 1))
        return Image.fromarray(photograph[top : top + height, left : left + width])

    return make


def write_odd_files(folder: Path, cut) -> None:
    """One file of each kind that decoders treat differently."""
    folder.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees", which replay must not do
    cut(1, 70, 110).save(folder / "plain.jpg", quality=90)
    cut(2, 70, 110).save(folder / "rotated.jpg", exif=exif)
    cut(3, 90, 61).convert("L").save(folder / "gray.jpg")
    cut(4, 61, 90).convert("CMYK").save(folder / "cmyk.jpg")
    cut(5, 64, 77).save(folder / "progressive.jpg", progressive=True, subsampling=2)
    cut(6, 80, 50).save(folder / "colour.png")
    cut(7, 50, 80).convert("L").save(folder / "gray.png")
    cut(8, 66, 66).convert("RGBA").save(folder / "alpha.png")
    cut(9, 40, 99).convert("P").save(folder / "palette.png")
    cut(10, 75, 55).save(folder / "picture.webp", lossless=True)
    cut(11, 60, 90).save(folder / "a name.with dots.jpeg", quality=95)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, cut) -> Path:
    """An image folder: 5 classes, train/ of 48 files of many kinds, val/ of 10."""
    root = tmp_path_factory.mktemp("images")
    for split, per_class in (("train", 8), ("val", 2)):
        for c, name in enumerate(CLASSES):
            inside = root / split / name
            inside.mkdir(parents=True)
            for k in range(per_class):
                seed = 1000 * c + 10 * k + (split == "val")
                height, width = 48 + (seed * 7) % 60, 48 + (seed * 13) % 70
                cut(seed, height, width).save(inside / f"{k}.jpg", quality=90)
    write_odd_files(root / "train" / CLASSES[2] / "deeper", cut)
    return root


@pytest.fixture(scope="session")
def few(tmp_path_factory, cut) -> Path:
    """Three classes, names with dots and spaces, images of unequal sides."""
    root = tmp_path_factory.mktemp("few")
    for c, name in enumerate(("a", "b", "c")):
        (root / "train" / name).mkdir(parents=True)
        for k in range(6):
            cut(10 * c + k, 40 + 3 * k, 90 - 5 * k).save(root / "train" / name / f"i{k}.jpg")
    cut(77, 40, 90).save(root / "train" / "a" / "x.y.v2.jpg")
    cut(78, 90, 41).save(root / "train" / "b" / "ein Bär.jpg")
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, cut) -> Path:
    """Weights of a tiny ResNet for `CLASSES`, at random but standardised on real pictures, so that
    its labels are neither flat nor all alike."""
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=len(CLASSES)).eval()
    pictures = np.stack([np.asarray(cut(k, 32, 32)) for k in range(200)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    preprocessing = models.build(ModelSpec("test_resnet"), pretrained=False).preprocessing
    with torch.no_grad():
        logits = module(normalise(pixels, preprocessing.mean, preprocessing.std))
        head = module.get_classifier()
        scale = 2.5 / logits.std(0)
        head.weight.mul_(scale[:, None])
        head.bias.copy_((head.bias - logits.mean(0)) * scale)
    file = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    facts = {"student": "test_resnet", "size": [32, 32], "interpolation": "bilinear"}
    weight_files.write_export(file, module, facts)
    return file


@pytest.fixture(scope="session")
def teacher(checkpoint) -> teachers.Teacher:
    return load_teacher(checkpoint)


def load_teacher(file: Path, **options) -> teachers.Teacher:
    spec = ModelSpec("test_resnet", "timm", file)
    (made,) = teachers.load_teachers(
        [spec], class_names=CLASSES, device=torch.device("cpu"), **options
    )
    return made


@pytest.fixture(scope="session")
def scanned(folder) -> images.ImageFolder:
    return images.scan(folder)


@pytest.fixture(autouse=True)
def _own_places(monkeypatch, tmp_path_factory):
    """No test touches the user's caches or inherits torchrun's environment."""
    place = str(tmp_path_factory.mktemp("tmp"))
    monkeypatch.setenv("TMPDIR", place)  # for processes that a test starts
    monkeypatch.setattr(tempfile, "tempdir", place)  # for this one
    # a command that ran in this process prints fkdpipe's messages itself, and keeps them to itself
    monkeypatch.setattr(logging.getLogger("fkdpipe"), "propagate", True)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
