"""Slow, obvious twins of what fkdpipe does fast. Each names the source it follows."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def crop_params(distribution, uniforms, height: int, width: int) -> tuple[int, int, int, int]:
    """torchvision 0.29 RandomResizedCrop.get_params in plain Python, with our random numbers.

    `uniforms(attempt, draw)` gives a float in [0, 1); draws 0 to 3 are area, aspect, top, left.
    """
    area = height * width
    for attempt in range(10):
        share = distribution.scale[0] + (distribution.scale[1] - distribution.scale[0]) * uniforms(
            attempt, 0
        )
        low, high = math.log(distribution.ratio[0]), math.log(distribution.ratio[1])
        aspect = math.exp(low + (high - low) * uniforms(attempt, 1))
        w = round(math.sqrt(area * share * aspect))
        h = round(math.sqrt(area * share / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniforms(attempt, 2) * (height - h + 1))
            left = int(uniforms(attempt, 3) * (width - w + 1))
            return top, left, h, w
    ratio = width / height
    if ratio < distribution.ratio[0]:
        w, h = width, round(width / distribution.ratio[0])
    elif ratio > distribution.ratio[1]:
        w, h = round(height * distribution.ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def pts_inverse(scaled, temperature: float = 0.1, power: float = 3.0):
    """T sign(y) |y|^n: undoes equation 2 of He et al., "Knowledge Distillation as Efficient
    Pre-training"."""
    return temperature * scaled.sign() * scaled.abs().pow(power)


def pillow_crop(path, box, flip: bool, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """uint8 (height, width, 3): decode, crop and resize with Pillow, as FKD's loader does."""
    top, left, height, width = (int(v) for v in box)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    with Image.open(path) as image:
        crop = image.convert("RGB").crop((left, top, left + width, top + height))
    resized = np.asarray(crop.resize((size[1], size[0]), method[interpolation]))
    return resized[:, ::-1] if flip else resized


def dense_target(kind: str, k: int, prob_C: np.ndarray) -> np.ndarray:
    """FKD equations 3 to 7 for one crop, written out class by class."""
    classes = len(prob_C)
    order = sorted(range(classes), key=lambda c: (-prob_C[c], c))
    if kind == "full":
        return np.array([p / prob_C.sum() for p in prob_C])
    if kind == "hard":
        return np.array([1.0 if c == order[0] else 0.0 for c in range(classes)])
    if kind == "smoothing":
        p = prob_C[order[0]]
        return np.array([p if c == order[0] else (1 - p) / (classes - 1) for c in range(classes)])
    kept = set(order[:k])
    mass = sum(prob_C[c] for c in kept)
    if kind == "marginal-renorm" or k == classes:
        return np.array([prob_C[c] / mass if c in kept else 0.0 for c in range(classes)])
    assert kind == "marginal-smoothing"
    return np.array(
        [prob_C[c] if c in kept else (1 - mass) / (classes - k) for c in range(classes)]
    )


def soft_cross_entropy(logits_C: np.ndarray, target_C: np.ndarray) -> float:
    """-sum p log q for one sample, in float64; 0 log 0 is 0."""
    z = logits_C.astype(np.float64)
    log_q = z - z.max() - math.log(np.exp(z - z.max()).sum())
    return -sum(p * q for p, q in zip(target_C.tolist(), log_q.tolist(), strict=True) if p > 0)


def colour_jitter(picture_3HW, factors: list[float]):
    """uint8 (3, H, W): torchvision's four operations one after another on floats, rounded once."""
    import torch
    from torchvision.transforms.v2 import functional

    brightness, contrast, saturation, hue = factors
    x = picture_3HW.to(torch.float64) / 255
    x = functional.adjust_brightness(x, brightness)
    x = functional.adjust_contrast(x, contrast)
    x = functional.adjust_saturation(x, saturation)
    x = functional.adjust_hue(x, hue)
    return (x * 255).round().to(torch.uint8)
