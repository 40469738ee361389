"""What a type checker sees of the public API: nothing of a batch is Any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fkdpipe

PACKAGES = Path(fkdpipe.__file__).parents[1]  # mypy does not follow editable installs

SCRIPT = """\
from collections.abc import Callable

import torch
from fkdpipe import LabelledCrops, generate, load_teacher, losses, open_store

def train(network: torch.nn.Module, student: Callable[[torch.Tensor], torch.Tensor]) -> float:
    teacher = load_teacher(network, size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
    generate("images", "store", teacher=teacher, form="topk:10", crops=200)
    crops = LabelledCrops("store", "images", target="hard", size=224, batch_size=256)
    for batch in crops:
        loss = losses.soft_cross_entropy(student(batch.pixels), batch.labels).mean()
        torch.autograd.backward(loss)  # of loss.backward() torch does not say the types
    return open_store("store").report().bytes_per_crop
"""

REVEALED = {
    "batch": "fkdpipe.train.batch.Batch",
    "batch.pixels": "torch._tensor.Tensor",
    "batch.labels": "torch._tensor.Tensor",
    "batch.features": "torch._tensor.Tensor | None",
    "batch.keys": "tuple[str, ...]",
    "crops.num_classes": "int",
    "crops.class_names": "tuple[str, ...]",
    "len(crops)": "int",
}


@pytest.mark.slow
def test_a_strict_script_has_no_error_and_no_any(tmp_path):
    lines = SCRIPT.splitlines()
    inside = lines.index("    for batch in crops:") + 1
    lines[inside:inside] = [f"        reveal_type({name})" for name in REVEALED]
    (tmp_path / "script.py").write_text("\n".join(lines) + "\n")
    options = ["--strict", "--disallow-any-expr", "--no-error-summary", "--cache-dir", "cache"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
        capture_output=True,
        text=True,
    )
    notes = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert [line for line in done.stdout.splitlines() if "error:" in line] == [], done.stdout
    assert done.returncode == 0, done.stderr
    assert len(notes) == len(REVEALED)
    for line, (name, wanted) in zip(notes, REVEALED.items(), strict=True):
        assert f'"{wanted}"' in line, (name, line)
