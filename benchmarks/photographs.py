"""An image folder of crops from the photographs shipped with scikit-learn and scikit-image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from sklearn.datasets import load_sample_images

# Photographs in scikit-image's wheel with at least 600 x 400 pixels.
_SKIMAGE = ("coffee.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png",
            "hubble_deep_field.jpg", "retina.jpg")  # fmt: skip


def write_folder(root: Path, count: int, *, seed: int = 0) -> float:
    """Write `count` JPEGs (quality 90, 4:2:0) of about 500 x 375 pixels into `root`/train.

    Returns:
        Mean number of pixels per image (about 222,000).
    """
    random = np.random.default_rng(seed)
    photographs = [*load_sample_images().images]
    folder = Path(skimage.__file__).parent / "data"
    for name in _SKIMAGE:
        with Image.open(folder / name) as image:
            photographs.append(np.asarray(image.convert("RGB")))
    pixels = 0
    for k in range(count):
        photograph = photographs[k % len(photographs)]
        height = int(random.integers(370, min(440, photograph.shape[0] + 1)))
        width = int(random.integers(500, min(620, photograph.shape[1] + 1)))
        top = int(random.integers(photograph.shape[0] - height + 1))
        left = int(random.integers(photograph.shape[1] - width + 1))
        piece = Image.fromarray(photograph[top : top + height, left : left + width])
        inside = root / "train"
        inside.mkdir(parents=True, exist_ok=True)
        piece.save(inside / f"{k:05d}.jpg", quality=90, subsampling="4:2:0")
        pixels += height * width
    return pixels / count
