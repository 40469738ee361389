"""The guides' commands and programs run as written, with smaller numbers."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import click.testing
import pytest
import timm
import torch
from conftest import CLASSES

from fkdpipe.cli import cli
from fkdpipe.networks import weight_files

DOCS = Path(__file__).parents[2] / "docs"
SMALLER = {
    "resnet50=": "test_resnet=",
    "--fraction 0.1 --plot": "--fraction 1 --crops 2 --plot",
    "pre:512": "pre:40",
    "--crops 100": "--crops 4",
    "--student resnet18": "--student test_resnet --set student_options.channels=[16,16,16,24]",
    "--epochs 100 --lr 0.3 --batch-size 512": "--epochs 4 --lr 0.01 --batch-size 16 --size 32",
    "runs/pretrained pets": "runs/pretrained pets --epochs 2 --batch-size 16",
    "--recipe recipes/": f"--set seeds=[0] --set lr=[0.01] --recipe {DOCS.parent}/recipes/",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.S | re.M)


@pytest.fixture(scope="module")
def place(tmp_path_factory, folder, checkpoint) -> Path:
    root = tmp_path_factory.mktemp("guides")
    for name in ("images", "pets", "flowers"):
        (root / name).symlink_to(folder)
    shutil.copy(checkpoint, root / "teacher.safetensors")
    return root


def smaller(line: str) -> list[str]:
    for long, short in SMALLER.items():
        line = line.replace(long, short)
    return shlex.split(line)


def run(lines: str) -> dict[str, str]:
    said = {}
    for line in lines.splitlines():
        program, *words = smaller(line)
        assert program == "fkdpipe"
        done = click.testing.CliRunner().invoke(cli, words)
        assert done.exit_code == 0, f"{line}\n{done.output}"
        said[words[0]] = done.stdout
    return said


@pytest.mark.slow
def test_the_way_from_features_to_transfer(place, monkeypatch):
    monkeypatch.chdir(place)
    offline, online = blocks("guide-features.md", "sh")
    assert all(long in (DOCS / "guide-features.md").read_text() for long in list(SMALLER)[:7])
    said = run(offline)
    assert (place / "basis.png").is_file()
    assert re.search(r"fine-tune.*\n.*probe", said["transfer"])
    assert "features" in said["report"]
    run(online)
    (more,) = blocks("guide-transfer.md", "sh")
    told = run(more.replace("pets flowers", "pets"))
    assert "pets" in told["transfer"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_python_of_the_transfer_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pretrained").mkdir(parents=True)
    module = timm.create_model("resnet18", num_classes=len(CLASSES))
    weight_files.write_export(tmp_path / "runs/pretrained/student.safetensors", module, {})
    made: dict = {}
    for block in blocks("guide-transfer.md", "python"):
        exec(block, made)
    weight = module.layer4[0].conv1.weight
    for name in ("detector", "fcn", "deeplab", "maps"):
        found = [p for n, p in made[name].named_parameters() if n.endswith("layer4.0.conv1.weight")]
        assert torch.equal(found[0], weight), name
