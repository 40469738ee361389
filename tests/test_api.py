"""The public API: what `import fkdpipe` names, and what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fkdpipe
from fkdpipe.common import errors

INIT = Path(fkdpipe.__file__)


@pytest.mark.parametrize("name", fkdpipe.__all__)
def test_every_public_name_is_there_and_explained(name):
    assert getattr(fkdpipe, name).__doc__
    assert name in dir(fkdpipe)


def test_every_error_is_public():
    found = {n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, Exception)}
    assert found <= set(fkdpipe.__all__)


def test_type_checkers_see_the_same_names():
    """Those that are imported on use are imported for type checkers too."""
    tree = ast.parse(INIT.read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        (alias.name, f"{node.module}")
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {(name, f"fkdpipe.{room}") for name, room in fkdpipe._ROOMS.items()}
    assert set(fkdpipe._ROOMS) <= set(fkdpipe.__all__)


def test_importing_it_imports_nothing_heavy():
    code = "import sys, fkdpipe; print(*{name.split('.')[0] for name in sys.modules})"
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "torchvision", "timm", "numpy", "zarr", "click", "pydantic", "PIL"}
    assert not heavy & set(outcome.stdout.split())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Labels'"):
        fkdpipe.Labels  # noqa: B018
