"""URLs in the place of local paths are refused before anything is made."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import fkdpipe
from fkdpipe.cli import cli
from fkdpipe.common import disk
from fkdpipe.common.errors import UsageError
from fkdpipe.networks import class_maps, features
from fkdpipe.networks.models import parse_spec
from fkdpipe.storage.location import open_location

URL = "s3://bucket/some/run"
PATHS = [
    (command, parameter.name)
    for command in cli.commands.values()
    for parameter in command.params
    if isinstance(parameter.type, click.Path)
]


@pytest.mark.parametrize(
    ("command", "name"), PATHS, ids=[f"{command.name}-{name}" for command, name in PATHS]
)
def test_every_local_path_of_every_command_refuses_a_url(command, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [command.name]
    for parameter in command.params:
        if parameter.name == name or parameter.required:
            option = isinstance(parameter, click.Option)
            value = URL if parameter.name == name else "x"
            words += [parameter.opts[0], value] if option else [value]
    outcome = CliRunner().invoke(cli, words)
    assert outcome.exit_code == 2, outcome.output
    assert f"{URL} is a URL" in outcome.stderr
    assert (name if name in ("data", "basis") else name.replace("_", "-")) in (
        outcome.stderr.lower()
    )
    assert not list(tmp_path.iterdir())


def test_more_than_a_few_options_are_paths():
    named = {(command.name, name) for command, name in PATHS}
    assert {("train", "out"), ("train", "cache"), ("fit-basis", "basis"), ("export", "out"),
            ("inspect", "out"), ("generate", "data"), ("train", "recipe")} <= named  # fmt: skip


@pytest.mark.parametrize(
    "use",
    [
        lambda url: fkdpipe.generate(url, "store", teacher="test_resnet"),
        lambda url: fkdpipe.generate("x", Path(url), teacher="test_resnet"),
        lambda url: fkdpipe.evaluate("test_resnet", url),
        parse_spec,
        lambda url: fkdpipe.load_teacher(f"test_resnet={url}"),
        lambda url: fkdpipe.LabelledCrops(None, url, target="ground-truth", size=8, batch_size=1),
        lambda url: fkdpipe.open_store(Path(url)),
        lambda url: features.load_basis(Path(url)),
        lambda url: class_maps.read(Path(url)),
    ],
    ids=range(9),
)
def test_python_refuses_them_too(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"{URL} is a URL"):
        use(URL)
    assert not list(tmp_path.iterdir())


def test_paths_and_urls_of_stores_are_taken(tmp_path):
    for path in ("a/b", "/a/b", "./a:b/c", "a b", str(tmp_path)):
        assert disk.local_path(path) == Path(path)
    assert open_location(f"file://{tmp_path}").url == str(tmp_path)
    assert open_location("memory://x").url == "memory://x"
