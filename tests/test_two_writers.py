"""Several real processes on one store: shared work gives one store, a mistake is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pipeline import arrays_of, make_store

from fkdpipe.storage import verify
from fkdpipe.storage.store import Store, open_store

# `fkdpipe` with units of a few images, and a pause in each so that processes really overlap.
FEW_IMAGES = """
import time
from fkdpipe.cli import main
from fkdpipe.labelgen import unit
from fkdpipe.storage import schema

schema.UNIT_IMAGES = 8
plain = unit.Unit.make


def slow(self, *args):
    time.sleep(0.3)
    return plain(self, *args)


unit.Unit.make = slow
main()
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder, teacher) -> Store:
    """One process's store, never interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 8)
        store = make_store(tmp_path_factory.mktemp("whole") / "store", folder, [teacher])
    assert store.num_units > 4
    return store


@pytest.fixture
def start(tmp_path, folder, checkpoint):
    """start(store, *options, launcher=...): a process that generates into it."""
    script = tmp_path / "few_images.py"
    script.write_text(FEW_IMAGES)

    def run(store: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
        words = [
            sys.executable, *launcher, str(script), "generate", str(folder), str(store),
            "--teacher", f"test_resnet={checkpoint}", "--source", "t", "--form", "topk:3",
            "--crops", "4", "--batch", "16", "--set", "threads=1", *options,
        ]  # fmt: skip
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return run


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def assert_same(store: Store, whole: Store) -> None:
    """Boxes, flips and images byte for byte; labels as close as the form promises."""
    assert not verify.verify(store, full=True)
    expected = arrays_of(whole)
    found = arrays_of(store)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        if name.endswith("/prob"):
            assert np.abs(values.astype(float) - expected[name].astype(float)).max() < 2e-3
        else:
            assert np.array_equal(values, expected[name]), name
    keys = {key for key, _ in whole.location.list()}
    assert {key for key, _ in store.location.list()} == keys
    for key in keys:
        if key.startswith(
            ("images/", "rounds/0/crops/", "commits/images/", "commits/rounds/0/crops/")
        ):
            assert store.location.read(key) == whole.location.read(key), key


@pytest.mark.slow
def test_parts_as_processes_and_torchrun_both_give_the_store_of_one_process(tmp_path, whole, start):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    processes = [
        start(tmp_path / "parts", "--part", "1/2"),
        start(tmp_path / "parts", "--part", "2/2"),
        start(tmp_path / "ranks", launcher=torchrun),
    ]
    assert [code for code, _ in ends(processes)] == [0, 0, 0]
    for name in ("parts", "ranks"):
        assert_same(open_store(tmp_path / name), whole)


@pytest.mark.slow
def test_two_processes_started_on_the_same_part_are_never_mixed(tmp_path, whole, start):
    place = tmp_path / "store"
    shutil.copytree(whole.url, place)
    for kind in ("labels/t", "crops"):  # the list of images is there, everything else is missing
        shutil.rmtree(place / "rounds" / "0" / kind)
        shutil.rmtree(place / "commits" / "rounds" / "0" / kind)
    codes = sorted(ends([start(place), start(place)]))
    assert [code for code, _ in codes] == [0, 1]
    assert "is being written by process" in codes[1][1]
    assert "Traceback" not in codes[1][1]
    assert_same(open_store(place), whole)
