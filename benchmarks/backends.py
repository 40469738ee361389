"""Differences between the two replay backends, in pixels and in a network's labels.

    python benchmarks/backends.py [--quick]

The same crops of the same JPEGs through `cpu` (torch's uint8 kernel) and `dali` (its resize, here
also on the CPU), at 224 px. A network labels both: a small timm model with random weights, with its
head scaled so that the labels are neither flat nor all alike. Random weights show how pixel
differences propagate, not how they affect accuracy. For comparison, the same is measured between
bilinear and bicubic of the `cpu` backend, a mismatch that the provenance of a store prevents.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
import photographs
import timm
import torch

from fkdpipe.pixels import crops, images
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.pixels.replay import Backend, Interpolation, Request, View, normalise, open_replay

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, CROPS, MODEL = 224, 4, "resnet18"


def requests(data: Path) -> list[Request]:
    """CROPS crops of every image, 16 images at a time."""
    listed = images.scan(data, need_classes=False)
    drawn = crops.sample(
        CropDistribution(),
        seed=0,
        image_id_N=crops.image_ids(listed.keys),
        size_N2=listed.size_N2,
        crops_M=np.arange(CROPS),
    )
    parts = [slice(k, k + 16) for k in range(0, len(listed.keys), 16)]
    return [
        Request.of(listed.root, listed.keys[part], listed.size_N2[part], drawn[part])
        for part in parts
    ]


def pixels(backend: Backend, kind: Interpolation, batches: list[Request]) -> torch.Tensor:
    """uint8 (crops, 3, 224, 224)."""
    with open_replay(backend, [View((SIZE, SIZE), kind)], threads=2) as replayer:
        outputs = [p.views[0].clone() for p in replayer.run(batches)]
    return torch.cat(outputs)


def network(some: torch.Tensor) -> torch.nn.Module:
    """A random network whose outputs are standardised on some crops and scaled by 2.5."""
    torch.manual_seed(0)
    module = timm.create_model(MODEL, num_classes=1000).eval()
    with torch.no_grad():
        logits = module(normalise(some, MEAN, STD))
        head = module.get_classifier()
        scale = 2.5 / logits.std(0)
        head.weight.mul_(scale[:, None])
        head.bias.copy_((head.bias - logits.mean(0)) * scale)
    return module


@torch.inference_mode()
def probabilities(module: torch.nn.Module, seen: torch.Tensor) -> torch.Tensor:
    parts = [module(normalise(part, MEAN, STD)).softmax(1) for part in seen.split(32)]
    return torch.cat(parts)


def compare(name: str, module: torch.nn.Module, a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """Differences of pixels in grey levels, and total variation of the labels."""
    levels = (a.int() - b.int()).abs()
    inside = levels[..., 1:-1, 1:-1]
    p, q = probabilities(module, a), probabilities(module, b)
    variation = 0.5 * (p - q).abs().sum(1)
    return {
        "compared": name,
        "mean level": float(levels.float().mean()),
        "max level": int(levels.max()),
        "max inside": int(inside.max()),
        "share differing": float((levels > 0).float().mean()),
        "label tv mean": float(variation.mean()),
        "label tv max": float(variation.max()),
        "same top-1": float((p.argmax(1) == q.argmax(1)).float().mean()),
    }


def main() -> None:
    arguments = common.arguments(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photographs.write_folder(Path(folder), 32 if arguments.quick else 128)
        batches = requests(Path(folder))
        seen = {
            (backend, kind): pixels(backend, kind, batches)
            for backend in ("cpu", "dali")
            for kind in ("bilinear", "bicubic")
        }
    module = network(seen["cpu", "bilinear"][:64])
    rows = [
        compare(f"cpu, dali: {kind}", module, seen["cpu", kind], seen["dali", kind])
        for kind in ("bilinear", "bicubic")
    ]
    rows.append(
        compare("cpu: bilinear, bicubic", module, seen["cpu", "bilinear"], seen["cpu", "bicubic"])
    )
    figures = {
        f"{what.replace(' ', '_').replace('-', '')}_{kind}": row[what]
        for kind, row in zip(("bilinear", "bicubic"), rows, strict=False)
        for what in ("mean level", "max level", "max inside", "label tv mean", "same top-1")
    }
    common.finish("backends", rows, {"crops": len(seen["cpu", "bilinear"]), **figures},
                  quick=arguments.quick)  # fmt: skip


if __name__ == "__main__":
    main()
