"""docs/python.md and README's Python run: block after block, in one namespace."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from pipeline import train

from fkdpipe.commands import demo_data

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "python.md").read_text()

# The page's numbers are those of real use; here they are small enough for two cores.
SMALLER = {
    "resnet50=": "test_resnet=",
    '"resnet18"': '"test_resnet"',
    '"resnet50"': '"test_resnet"',
    "resnet50/": "test_resnet/",
    "topk:10": "topk:5",
    "crops=200": "crops=4",
    "size=224": "size=32",
    "batch_size=256": "batch_size=16",
    "256 // 2": "16 // 2",
    "range(25)": "range(2)",
}


def blocks(text: str) -> list[tuple[str, str]]:
    """(why it is not run or "", code) of every block of Python."""
    return re.findall(r"(?:^<!-- not run: (.+) -->\n\n)?^```python\n(.*?)^```", text, re.S | re.M)


@pytest.mark.slow
def test_every_block_of_the_page_runs(folder, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(folder)
    shutil.copy(checkpoint, "teacher.safetensors")
    assert PAGE.count("```python") == len(blocks(PAGE))
    assert [why for why, _ in blocks(PAGE) if why] == ["needs torchrun"]
    names: dict = {}
    for why, code in blocks(PAGE):
        for long, short in SMALLER.items():
            code = code.replace(long, short)
        if not why:
            exec(compile(code, code, "exec"), names)
    said = capsys.readouterr().out
    assert "cannot serve target full" in said
    assert names["boxes"].shape == (2, 1, 4)
    assert names["probabilities"].shape == (1, 4, 5)
    assert names["vectors"].shape == (1, 4, names["batch"].features.shape[1])
    assert names["accuracy"].images == 51


@pytest.mark.parametrize("long", SMALLER)
def test_what_is_made_smaller_is_there(long):
    assert long in PAGE


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_run_as_printed(tmp_path, monkeypatch):
    """On what `make demo` leaves, with fewer pictures and a smaller teacher."""
    monkeypatch.chdir(tmp_path)
    demo_data.make_images(tmp_path / "demo" / "images", count=100)
    train(tmp_path / "demo/teacher", tmp_path / "demo/images", None, target="ground-truth")
    ((why, code),) = blocks(README)
    assert not why
    assert README.index(code) < README.index("$ make demo")  # on the first screen
    names: dict = {}
    exec(code, names)
    assert 0 < names["loss"].item() < 5
    assert names["crops"].epoch == 5
