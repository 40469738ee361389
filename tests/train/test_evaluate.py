"""Evaluation: what is left out is named and counted; outputs that are not finite are refused."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from click.testing import CliRunner
from conftest import load_teacher
from pipeline import make_store, prepare_run, train_settings

from fkdpipe import evaluate
from fkdpipe.cli import cli
from fkdpipe.common.errors import ImagesError, ModelError
from fkdpipe.networks import models
from fkdpipe.pixels import images
from fkdpipe.train import loop, metrics
from fkdpipe.train.evaluate import accuracy

CPU = torch.device("cpu")
FAILED = {
    "ash/0.jpg": "unreadable: ",
    "beech/1.jpg": "broken-header: Truncated File Read",
    "notes.txt": "not-an-image: its content is not JPEG, PNG or WebP",
}


@pytest.fixture
def data(tmp_path, folder):
    """Ten held-out images: one is truncated, one has a broken header; and a text file."""
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    val = root / "val"
    (val / "ash" / "0.jpg").write_bytes((val / "ash" / "0.jpg").read_bytes()[:900])
    (val / "beech" / "1.jpg").write_bytes((val / "beech" / "1.jpg").read_bytes()[:30])
    (val / "notes.txt").write_text("not an image")
    return root


@pytest.fixture
def spoilt(checkpoint):
    loaded = load_teacher(checkpoint)
    with torch.no_grad():
        next(loaded.module.parameters())[0, 0, 0, 0] = float("nan")
    return loaded


def test_files_that_are_left_out_are_named_and_counted(data, checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        result = evaluate(f"test_resnet={checkpoint}", data)
    assert (result.images, result.skipped) == (8, 3)
    assert result.failed.keys() == FAILED.keys()
    for key, why in FAILED.items():
        assert result.failed[key].startswith(why)
        assert len(result.failed[key]) > len("unreadable: ")
        assert sum(f"{key} is left out: " in line for line in caplog.messages) == 1


def test_the_command_counts_them_too(data, checkpoint):
    arguments = ["evaluate", str(data), f"test_resnet={checkpoint}"]
    as_json = CliRunner().invoke(cli, [*arguments, "--json"])
    assert as_json.exit_code == 0, as_json.output
    figures = json.loads(as_json.stdout)
    assert (figures["images"], figures["skipped"]) == (8, 3)
    assert figures["failed"].keys() == FAILED.keys()
    told = CliRunner().invoke(cli, arguments)
    assert "on 8 images; 3 files left out" in told.stdout
    assert "ash/0.jpg is left out: unreadable" in told.stderr


def test_nothing_left_out_is_nothing_said(folder, checkpoint):
    told = CliRunner().invoke(cli, ["evaluate", str(folder), f"test_resnet={checkpoint}"])
    assert told.stdout.endswith("on 10 images\n")
    assert not evaluate(f"test_resnet={checkpoint}", folder).failed


def test_no_readable_image_is_an_error_with_an_example(tmp_path, folder, checkpoint):
    data = tmp_path / "data"
    shutil.copytree(folder / "val", data)
    for file in data.rglob("*.jpg"):
        file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(ImagesError, match=r"none of 10 images .* ash/0.jpg: unreadable"):
        evaluate(f"test_resnet={checkpoint}", data)


def test_training_names_broken_validation_images_once(tmp_path, data, teacher, caplog):
    store = make_store(tmp_path / "store", data, [teacher])
    run = prepare_run(tmp_path / "run", data, store, train_settings(epochs=4, eval_every=1))
    with caplog.at_level(logging.WARNING):
        loop.train(run)
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert len(evaluations) > 1
    for line in evaluations:
        assert (line["images"], line["skipped"]) == (8, 1)
        assert "failed" not in line
    for key in FAILED:
        assert sum(f"{key} is left out: " in line for line in caplog.messages) == 1


def test_accuracy_leaves_out_what_cannot_be_read(data):
    loaded = models.build(
        models.parse_spec("test_resnet"), classes=5, size=(32, 32), pretrained=False
    )
    held_out = images.scan(data, split="val")
    result = accuracy(loaded.module, loaded.preprocessing, held_out, device=CPU, batch_size=3)
    assert (result.images, result.skipped) == (len(held_out) - 1, 1)


def test_outputs_that_are_not_finite_are_an_error(folder, spoilt):
    with pytest.raises(ModelError, match=r"test_resnet.* not finite at precision float32"):
        evaluate(spoilt, folder)


def test_one_infinite_output_is_enough(folder, checkpoint):
    loaded = load_teacher(checkpoint)
    with torch.no_grad():
        loaded.module.network.get_classifier().bias[2] = float("-inf")
    with pytest.raises(ModelError, match="not finite"):
        evaluate(loaded, folder)


def test_during_training_they_count_as_wrong_with_a_warning(folder, spoilt, caplog):
    held_out = images.scan(folder, split="val")
    with caplog.at_level(logging.WARNING):
        result = accuracy(spoilt.module, spoilt.preprocessing, held_out, device=CPU)
    assert (result.top1, result.top5, result.images) == (0, 0, 10)
    assert "outputs for 10 of 10 images are not finite" in caplog.text
