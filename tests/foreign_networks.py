"""Networks that no library has, as users of fkdpipe bring them."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import torch
from conftest import CLASSES
from torch import nn

STATISTICS = {"mean": (0.45, 0.5, 0.55), "std": (0.2, 0.25, 0.3)}
_numbers = count()

_SOURCE = """
from pathlib import Path
import foreign_networks
from torch import nn

{mark}

def _told(network):
    network.pretrained_cfg = {{"input_size": (3, 32, 32), **foreign_networks.STATISTICS}}
    return network

def teacher():
    return _told(foreign_networks.small_cnn())

def student(num_classes, width=4):
    return _told(foreign_networks.small_cnn(classes=num_classes, width=width, seed=None))

def silent():
    return foreign_networks.small_cnn()

def no_module():
    return 1

def broken():
    return 1 / 0
"""


def small_cnn(classes: int = len(CLASSES), width: int = 4, seed: int | None = 0) -> nn.Sequential:
    """A CNN of plain torch, with batch norm, for images of any size; seed None leaves torch's."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, classes),
        )


def write_functions(folder: Path, mark: str | None = None) -> str:
    """A module file of functions that return networks; its name.

    Args:
        mark: a file that importing it leaves.
    """
    name = f"users_networks_{next(_numbers)}"  # a name of its own: Python keeps what it imported
    line = "" if mark is None else f"Path({str(folder / mark)!r}).touch()"
    (folder / f"{name}.py").write_text(_SOURCE.format(mark=line))
    return name
