"""The house: who may import whom, file and function lengths, nothing printed below the CLI."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fkdpipe"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each room may import of the package. `commands`, `cli` and the front door may import all.
# With those four there are 13 rooms; 41 arrows between them (`arrows()`) on 2026-11-25.
MAY_IMPORT = {
    "common": set(),
    "pixels": {"common"},
    "networks": {"common"},
    "storage": {"common", "pixels"},
    "interchange": {"common", "pixels", "storage"},
    "labelgen": {"common", "pixels", "networks", "storage"},
    "inspect": {"common", "pixels", "networks", "storage"},
    "train": {"common", "pixels", "networks", "storage"},
    "downstream": {"common", "pixels", "networks", "storage", "train"},
}
TOP = {"cli", "commands", "__init__", "__main__"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def arrows() -> dict[str, set[str]]:
    """Room -> the other rooms it imports; names in the front door count as `__init__`."""
    rooms = {room(path) for path in FILES}
    graph: dict[str, set[str]] = {name: set() for name in rooms}
    for path in FILES:
        for name in imports(path):
            if name.startswith("fkdpipe."):
                other = name.split(".")[1]
                graph[room(path)].add(other if other in rooms else "__init__")
    return {name: others - {name} for name, others in graph.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path):
    allowed = MAY_IMPORT.get(room(path))
    if allowed is None:
        return
    others = {name.split(".")[1] for name in imports(path) if name.startswith("fkdpipe.")}
    assert others - allowed - {room(path)} == set()


def test_only_replay_imports_nvidias_decoders_and_storage_no_torch():
    for path in FILES:
        names = {name.split(".")[0] for name in imports(path)}
        assert "nvidia" not in names or path.name in ("dali.py", "region.py")
        if room(path) == "storage":
            assert not names & {"torch", "torchvision", "timm"}
        if room(path) not in TOP:
            assert "click" not in names


def test_every_room_is_in_the_table():
    assert {room(path) for path in FILES} == {*MAY_IMPORT, *TOP}


def test_no_rooms_import_each_other_in_a_circle():
    # The front door imports on use, and hands on what lies below it.
    graph = {name: others - {"__init__"} for name, others in arrows().items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    for name, others in graph.items():
        if name not in TOP:
            assert not others & TOP, f"{name} imports what lies above it"


def test_storage_takes_from_pixels_what_needs_no_torch():
    for path in (PACKAGE / "storage").glob("*.py"):
        parts = {name for name in imports(path) if name.startswith("fkdpipe.pixels.")}
        assert {name.split(".")[2] for name in parts} <= {"crops", "images"}, path.name
    modules = [f"fkdpipe.storage.{path.stem}" for path in (PACKAGE / "storage").glob("*.py")]
    names = ", ".join(modules)
    code = f"import sys, {names}, fkdpipe.pixels.images\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 70, f"{node.name} has {length} lines"


def test_direct_dependencies_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    declared = {
        line.split(">")[0].split("[")[0].strip().lower().replace("-", "_") for line in lines
    }
    renamed = {"PIL": "pillow", "sklearn": "scikit_learn", "nvidia": "nvidia_dali_cuda130"}
    standard = __import__("sys").stdlib_module_names
    for path in FILES:
        for name in {name.split(".")[0] for name in imports(path)} - {"fkdpipe"}:
            assert name in standard or renamed.get(name, name).lower() in declared, name
