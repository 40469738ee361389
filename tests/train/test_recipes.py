"""Recipes: complete, known to the settings, and runnable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from pipeline import make_store

from fkdpipe.cli import cli
from fkdpipe.common import config
from fkdpipe.downstream.transfer import TransferSettings
from fkdpipe.networks import models
from fkdpipe.train import methods
from fkdpipe.train.settings import TrainSettings

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_recipe_is_known_to_the_settings(file):
    if file.name.startswith("transfer-"):
        config.build(TransferSettings, config.load_toml(file), where=file.name)
        return
    settings = config.build(TrainSettings, config.load_toml(file), where=file.name)
    methods.needs(settings.method)
    models.parse_spec(settings.student)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_recipe_says_where_it_is_from_and_how_it_is_run(file):
    header = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert f"recipes/{file.name}" in header
    assert re.search(r"[Mm]easured", header)
    for name in re.findall(r"--teacher ([\w.:/-]+)", header):
        models.parse_spec(name)


def test_the_small_recipe_runs(tmp_path, folder, teacher):
    make_store(tmp_path / "store", folder, [teacher], form="topk:5")
    recipe = next(file for file in RECIPES if file.name == "small-cpu.toml")
    done = CliRunner().invoke(
        cli,
        ["train", str(folder), str(tmp_path / "store"), "--recipe", str(recipe), "--epochs", "4",
         "--batch-size", "16", "--device", "cpu", "--out", str(tmp_path / "run"),
         "--cache", str(tmp_path / "cache")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
