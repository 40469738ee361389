"""The demo: real handwritten digits on real photographs, through the public commands.

scikit-learn bundles 1,797 scans of handwritten digits (8 x 8 pixels, UCI) and two photographs.
Each scan is pasted at a random position and size onto a piece of a photograph, so that crops of
one image show different things: a digit, part of one, or only background.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fkdpipe.common.errors import FkdpipeError, UsageError
from fkdpipe.common.progress import Reporter, silent

SIDE = 96  # of an image, in pixels
DIGIT_SIDES = (48, 80)  # range of the digit's side, in pixels
HELD_OUT = 5  # every fifth scan of a class is held out
SEED = 0

TEACHER = "resnet10t"
STUDENT = "resnet10t, a quarter as wide"
NARROW = "student_options.channels=[16,32,64,128]"


@dataclass(frozen=True)
class Outcome:
    """Results of the demo. Accuracies are top-1 percent on the held-out images."""

    teacher: float
    distilled: float
    ground_truth: float
    store: Path
    out: Path


def make_images(root: Path, *, count: int | None = None, reporter: Reporter = silent) -> None:
    """Write one JPEG per scan to `train/<digit>/` and `val/<digit>/`.

    Args:
        count: number of scans to use; by default all.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise UsageError("the demo requires scikit-learn: pip install 'fkdpipe[demo]'.") from error
    digits = load_digits()
    photographs = load_sample_images().images
    random = np.random.default_rng(SEED)
    seen: dict[int, int] = {}
    scans = list(zip(digits.images, digits.target.tolist(), strict=True))[:count]
    with reporter.task("images", len(scans), "images") as advance:
        for index, (scan, digit) in enumerate(scans):
            seen[digit] = seen.get(digit, 0) + 1
            split = "val" if seen[digit] % HELD_OUT == 0 else "train"
            folder = root / split / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            picture = _picture(scan, photographs[index % len(photographs)], random)
            picture.save(folder / f"scan-{index:04d}.jpg", quality=92)
            advance(1)


def _picture(scan: np.ndarray, photograph: np.ndarray, random: np.random.Generator) -> Image.Image:
    """Paste a digit, light on dark or dark on light, onto a piece of a photograph."""
    height, width = photograph.shape[:2]
    top, left = random.integers(height - SIDE), random.integers(width - SIDE)
    ground = photograph[top : top + SIDE, left : left + SIDE].astype(np.float32)
    side = int(random.integers(*DIGIT_SIDES))
    ink = Image.fromarray((scan * (255 / 16)).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    opacity = np.zeros((SIDE, SIDE, 1), dtype=np.float32)
    y, x = random.integers(SIDE - side, size=2)
    opacity[y : y + side, x : x + side, 0] = np.asarray(ink, dtype=np.float32) / 255
    under = ground[y : y + side, x : x + side].mean()
    bright = random.integers(170, 256, size=3)
    colour = (bright if under < 128 else 255 - bright).astype(np.float32)  # so that it is visible
    mixed = ground * (1 - opacity) + colour * opacity
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def commands(out: Path) -> dict[str, list[str]]:
    """The demo's public commands in order, keyed by their purpose."""
    images, store = str(out / "images"), str(out / "store")
    # No flips, since a mirrored digit is a different shape; and no very small crops.
    crop = ["--set", "crop.flip=0.0", "--set", "crop.scale=[0.25,1.0]"]
    budget = ["--size", "32", "--batch-size", "64", "--crops-per-image", "4", "--epochs", "60"]
    budget += ["--lr", "0.003", "--set", "optimizer.name=adamw", "--set", "eval_every=20"]
    student = ["--student", TEACHER, "--set", NARROW, *budget]
    return {
        "train a teacher on the folder's own classes": [
            "train", images, "--student", TEACHER, "--target", "ground-truth", *budget, *crop,
            "--out", str(out / "teacher"),
        ],
        "evaluate the teacher": ["evaluate", images, str(out / "teacher"), "--json"],
        "label recorded crops, once": [
            "generate", images, store, "--teacher", str(out / "teacher"), "--form", "topk:5",
            "--crops", "60", *crop,
        ],
        "check the store": ["verify", store, "--full"],
        "train a student on the labels; no teacher runs": [
            "train", images, store, "--target", "marginal-smoothing:5", *student,
            "--out", str(out / "student"),
        ],
        "train the same student on the folder's classes only, with the same crops and budget": [
            "train", images, store, "--target", "ground-truth", *student,
            "--out", str(out / "baseline"),
        ],
        "evaluate the student": ["evaluate", images, str(out / "student"), "--json"],
        "evaluate the baseline": ["evaluate", images, str(out / "baseline"), "--json"],
        "measure the store": ["report", store],
    }  # fmt: skip


def run(out: Path, *, say: Callable[[str], None], reporter: Reporter = silent) -> Outcome:
    """Write the images, then run each command in its own process.

    Args:
        say: prints one line.

    Raises:
        UsageError: `out` is a file or holds other files.
        FkdpipeError: a command failed.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; --out must be a folder.")
    if out.exists() and any(out.iterdir()) and not (out / "images").is_dir():
        raise UsageError(f"{out} is not empty; choose a new folder with --out.")
    if not (out / "images").is_dir():
        partial = out / "images.partial"
        make_images(partial, reporter=reporter)
        partial.rename(out / "images")
    top1 = []
    for purpose, words in commands(out).items():
        say(f"\n# {purpose}\n$ {shlex.join(['fkdpipe', *words])}")
        try:
            code, output = run_command(words)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"finished work is kept in {out}; the same command resumes."
            ) from error
        say(output.rstrip())
        if code:
            raise FkdpipeError(f"a command of the demo failed: fkdpipe {shlex.join(words)}")
        if words[0] == "evaluate":
            top1.append(float(json.loads(output)["top1"]))
    teacher, distilled, ground_truth = top1
    return Outcome(teacher, distilled, ground_truth, store=out / "store", out=out)


def run_command(words: list[str]) -> tuple[int, str]:
    """The exit code and stdout of `fkdpipe`, in its own process; Ctrl-C lets it keep its work."""
    command = [sys.executable, "-m", "fkdpipe", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    return process.returncode, output
