"""Write the table of bytes per crop into docs/methods.md; `make docs` runs it, a test holds it.

Shapes come from timm: the width of the penultimate vector, and channels and reduction of the last
stages.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import timm
import torch

from fkdpipe.networks import feature_layers
from fkdpipe.storage import features

FILE = Path(__file__).with_name("methods.md")
TEACHERS = (
    "resnet34", "resnet50", "regnety_160", "convnext_base", "swin_small_patch4_window7_224",
    "swin_large_patch4_window7_224", "vit_base_patch16_224", "beit_large_patch16_224",
)  # fmt: skip
COMPONENTS = 512  # of a ResNet-18
_HALF = 2  # bytes of a float16
_PLACE = re.compile(r"(?<=<!-- docs/make_bytes.py -->\n).*?(?=<!-- end -->)", re.S)


def vector_bytes(dims: int, code: features.Code) -> int:
    """Bytes per crop of a stored vector, before compression."""
    fields = features.fields(dims, code)
    return sum(math.prod(field.shape) * np.dtype(field.dtype).itemsize for field in fields)


def stage_bytes(name: str, network: torch.nn.Module, stage: int) -> int:
    """Bytes per crop of a float16 map, stages counted from the end."""
    info = network.feature_info[-stage]
    size = timm.get_pretrained_cfg(name).input_size[-1]
    side = size // info["reduction"]
    return info["num_chs"] * side * side * _HALF


def row(name: str) -> list[str]:
    with torch.device("meta"):
        network = timm.create_model(name)
    width = feature_layers.width(network)
    last, before = (stage_bytes(name, network, stage) for stage in (1, 2))
    return [
        f"`{name}`",
        f"{width:,}",
        f"{vector_bytes(width, 'float16'):,}",
        f"{vector_bytes(COMPONENTS, 'float16'):,}",
        f"{vector_bytes(COMPONENTS, 'int8'):,}",
        f"{last:,}",
        f"{last + before:,}",
    ]


def render() -> str:
    head = [
        "teacher", "D_t", "`srd`, or `kdep` with whole vectors", f"`kdep`, {COMPONENTS} components",
        "the same in int8", "last stage map", "last two stage maps",
    ]  # fmt: skip
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *(row(name) for name in TEACHERS)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def fill(page: str) -> str:
    """The page with the table in its place."""
    return _PLACE.sub(lambda _: render(), page)


if __name__ == "__main__":
    FILE.write_text(fill(FILE.read_text()))
