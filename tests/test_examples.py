"""Examples run, differ little from the same scripts without labels, and go on where they stop."""

from __future__ import annotations

import difflib
import functools
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from pipeline import make_store
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(file.stem for file in EXAMPLES.glob("*.py"))
SMALL = ["--batch-size=16", "--workers=0", "--lr=0.01"]
MODEL = {"timm_script": ["--model=test_resnet", "--img-size=32"]}
OTHER = ["--student=test_resnet", "--size=32"]

pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own


@pytest.fixture(scope="module")
def images(tmp_path_factory, folder) -> Path:
    """For timm, the class of an image is the innermost folder."""
    place = tmp_path_factory.mktemp("examples") / "images"
    return Path(shutil.copytree(folder, place, ignore=shutil.ignore_patterns("deeper")))


@pytest.fixture(scope="module")
def store(images, teacher) -> str:
    return make_store(images.parent / "store", images, [teacher], form="topk:5").url


@pytest.fixture
def run(images, store, tmp_path, monkeypatch, capsys):
    """run(name, *words): the accuracy that an example prints last."""
    monkeypatch.chdir(tmp_path)

    def example(name: str, *words: str) -> float:
        file = EXAMPLES / f"{name}.py"
        labels = [] if "/" in name else [f"--store={store}"]
        small = [*SMALL, *MODEL.get(file.stem, OTHER)]
        monkeypatch.setattr(sys, "argv", [file.name, f"--images={images}", *labels, *small, *words])
        runpy.run_path(str(file), run_name="__main__")
        return float(re.findall(r"top-1 (\d+\.\d+) %", capsys.readouterr().out)[-1])

    return example


def code(file: Path) -> list[str]:
    """Lines that say something, without the docstring of the file."""
    return [line for line in file.read_text().split('"""', 2)[2].splitlines() if line.strip()]


def test_there_is_one_for_every_way_to_train():
    assert NAMES == [
        "accelerate_script", "hf_trainer", "lightning_module", "plain_loop", "timm_script",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_at_most_ten_lines_differ_from_the_same_script_without_labels(name):
    ours, plain = EXAMPLES / f"{name}.py", EXAMPLES / "without_labels" / f"{name}.py"
    lines = list(difflib.ndiff(code(plain), code(ours)))
    assert 4 <= sum(line.startswith("+") for line in lines) <= 10
    assert sum(line.startswith("-") for line in lines) <= 10
    assert "fkdpipe" not in plain.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["", "without_labels/"])
def test_it_runs(run, name, where):
    assert 0 <= run(where + name, "--epochs=2") <= 100


class StoppedError(Exception):
    pass


def stop_after_first(function):
    @functools.wraps(function)
    def call(*args, **options):
        function(*args, **options)
        raise StoppedError

    return call


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_the_plain_loop_goes_on_bit_for_bit(run, monkeypatch):
    torch.manual_seed(0)
    run("plain_loop", "--epochs=3", "--checkpoint=whole.pt")
    torch.manual_seed(0)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", stop_after_first(torch.save))
        with pytest.raises(StoppedError):
            run("plain_loop", "--epochs=3", "--checkpoint=parts.pt")
    run("plain_loop", "--epochs=3", "--checkpoint=parts.pt")
    whole, parts = torch.load("whole.pt"), torch.load("parts.pt")
    assert equal(whole["student"], parts["student"])
    assert whole["train"] == parts["train"]


@pytest.mark.slow
def test_accelerate_goes_on_bit_for_bit(run, monkeypatch):
    from accelerate import Accelerator

    torch.manual_seed(0)
    run("accelerate_script", "--epochs=3", "--out=whole")
    torch.manual_seed(0)
    with monkeypatch.context() as patched:
        patched.setattr(Accelerator, "save_state", stop_after_first(Accelerator.save_state))
        with pytest.raises(StoppedError):
            run("accelerate_script", "--epochs=3", "--out=parts")
    run("accelerate_script", "--epochs=3", "--out=parts")
    weights = [load_file(f"{out}/model.safetensors") for out in ("whole", "parts")]
    assert equal(*weights)


@pytest.mark.slow
def test_lightning_goes_on_bit_for_bit(run, monkeypatch, tmp_path):
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    monkeypatch.setattr(lightning, "Trainer", functools.partial(lightning.Trainer, callbacks=keep))
    run("lightning_module", "--epochs=3")
    whole = torch.load("epoch=2.ckpt", weights_only=False)
    (tmp_path / "epoch=2.ckpt").unlink()
    run("lightning_module", "--epochs=3", "--resume=epoch=0.ckpt")
    again = torch.load("epoch=2.ckpt", weights_only=False)
    assert equal(whole["state_dict"], again["state_dict"])
    assert whole["global_step"] == again["global_step"]


@pytest.mark.slow
def test_the_hf_trainer_goes_on_bit_for_bit(run, tmp_path):
    run("hf_trainer", "--epochs=3", "--out=whole")
    first, *_, last = sorted(tmp_path.glob("whole/checkpoint-*"), key=lambda p: int(p.name[11:]))
    run("hf_trainer", "--epochs=3", "--out=again", f"--resume={first}")
    again = tmp_path / "again" / last.name
    assert equal(*(load_file(place / "model.safetensors") for place in (last, again)))
