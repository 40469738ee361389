"""A student of the user's own: trained, exported and evaluated by its function's name."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import CLASSES
from foreign_networks import write_functions
from safetensors import safe_open

from fkdpipe.cli import cli


def invoke(*words) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    return result.exit_code, result.output


@pytest.fixture
def functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return write_functions(tmp_path)


def train(folder, *words) -> tuple[int, str]:
    fixed = ["--epochs", 2, "--batch-size", 16, "--set", "threads=1"]
    return invoke("train", folder, "--out", "run", *fixed, *words)


def test_a_students_own_function_is_trained_and_evaluated(tmp_path, folder, functions):
    student = f"python:{functions}:student"
    code, output = train(folder, "--student", student, "--set", "student_options.width=6")
    assert code == 0, output
    with safe_open("run/student.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["fkdpipe"])
        assert file.get_slice("0.weight").get_shape()[0] == 6  # the option reached the function
        assert file.get_slice("5.weight").get_shape() == [len(CLASSES), 24]
    assert facts["student"] == student
    assert facts["size"] == [32, 32]
    code, output = invoke("evaluate", folder, "run")
    assert code == 1
    named = f"{student}=run/student.safetensors"
    assert named in output  # says how to name it
    code, output = invoke("evaluate", folder, named, "--json")
    assert code == 0, output
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert json.loads(output.splitlines()[-1])["top1"] == pytest.approx(last["top1"])


def test_started_again_it_goes_on_and_the_seed_decides_its_weights(folder, functions):
    student = f"python:{functions}:student"
    assert train(folder, "--student", student)[0] == 0
    with safe_open("run/student.safetensors", "pt") as file:
        first = file.get_tensor("0.weight")
    assert train(folder, "--student", student)[0] == 0  # complete: nothing is trained again
    code, output = train(folder, "--student", student, "--out", "other")
    assert code == 0, output
    with safe_open("other/student.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("0.weight"), first)


def test_a_function_of_fixed_width_must_fit_the_classes(folder, functions, tmp_path):
    (tmp_path / "fixed.py").write_text(
        "import foreign_networks\n"
        "def ten():\n"
        "    network = foreign_networks.small_cnn(classes=10)\n"
        "    network.pretrained_cfg = dict(input_size=(3, 32, 32), **foreign_networks.STATISTICS)\n"
        "    return network\n"
    )
    code, output = train(folder, "--student", "python:fixed:ten")
    assert code == 1
    assert "has 10 outputs, but the data has 5 classes" in " ".join(output.split())


def test_a_live_teacher_and_a_probe_of_ones_own(folder, functions):
    student, teacher = f"python:{functions}:student", f"python:{functions}:teacher"
    code, output = train(folder, "--student", student, "--teacher", teacher, "--method", "kd")
    assert code == 0, output
    code, output = invoke(
        "transfer", f"{student}=run/student.safetensors", folder,
        "--mode", "probe", "--epochs", 1, "--lr", 0.01, "--json",
    )  # fmt: skip
    assert code == 0, output
    assert json.loads(output.splitlines()[-1])["rows"][0]["mode"] == "probe"
