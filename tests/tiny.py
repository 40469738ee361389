"""Tiny networks of every family that methods pair, at random weights."""

from __future__ import annotations

from typing import Any

import timm
import torch

SWIN = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (3, 3, 3, 3), "window_size": 4}
PLAIN = {"embed_dim": 48, "depth": 4, "num_heads": 3}

# family -> (timm name, options beside the size, input side in pixels)
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet": ("test_resnet", {}, 64),
    "mobilenet": ("mobilenetv1_100", {}, 64),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 64),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, 64),
    "vit": ("vit_tiny_patch16_224", PLAIN, 64),
    "beit": ("beit_base_patch16_224", PLAIN, 64),
    "mixer": ("mixer_s16_224", {}, 64),
    "convnext": ("test_convnext", {}, 64),
    "regnet": ("regnety_002", {}, 64),
    "deit": ("deit_tiny_distilled_patch16_224", PLAIN, 64),
}
SIZED = ("swin", "swinv2", "vit", "beit", "mixer", "deit")  # built for one input size


def options(family: str) -> dict[str, Any]:
    """Arguments of timm's `create_model` beside the number of classes."""
    _, extra, side = NETWORKS[family]
    return {**extra, "img_size": side} if family in SIZED else dict(extra)


def network(family: str, *, classes: int = 5, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    name = NETWORKS[family][0]
    return timm.create_model(name, num_classes=classes, **options(family))
