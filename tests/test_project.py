"""What the project says about itself: metadata, package data, the citation."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import yaml

import fkdpipe

ROOT = Path(__file__).parents[1]
TOML = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = TOML["project"]


def test_the_wheel_will_hold_every_file_of_the_package():
    """`make wheel` compares a wheel that was built; this needs no build."""
    patterns = [
        f"{package.replace('.', '/')}/{glob}"
        for package, globs in TOML["tool"]["setuptools"]["package-data"].items()
        for glob in globs
    ]
    assert (ROOT / "fkdpipe" / "py.typed").exists()
    for path in (ROOT / "fkdpipe").rglob("*"):
        inside = path.relative_to(ROOT).as_posix()
        if path.suffix == ".py":
            assert (path.parent / "__init__.py").exists(), inside
        elif path.is_file() and path.suffix != ".pyc":
            assert any(fnmatch.fnmatch(inside, pattern) for pattern in patterns), inside


def test_one_version_and_one_list_of_pythons():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == fkdpipe.__version__ == str(cited["version"])
    assert PROJECT["license"] == cited["license"]
    said = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">={said[0]}"
    (runs,) = re.findall(r"set -- \$\{\*:-(.*) lowest\}", (ROOT / ".ci" / "matrix").read_text())
    assert said == runs.split()
    table = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"| {run} |" in table for run in [*said, "lowest"])


def test_the_five_papers_are_cited():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert [one["notes"].split(";")[0] for one in cited] == ["FKD", "KDEP", "DPK", "ScaleKD", "SRD"]
    for one in cited:
        assert one["authors"]
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", one["identifiers"][0]["value"])


def test_the_readme_says_linux_only_and_leads_to_the_other_pages():
    text = (ROOT / "README.md").read_text()
    assert "Operating System :: POSIX :: Linux" in PROJECT["classifiers"]
    for name in ("Linux only", "](SECURITY.md)", "](CITATION.cff)", "](CONTRIBUTING.md)"):
        assert name in text
