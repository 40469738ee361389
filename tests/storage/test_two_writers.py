"""Several real processes on one store: shared work gives one store, a mistake is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pipeline import arrays_of, make_store

from fkdpipe.storage import verify
from fkdpipe.storage.store import Store, open_store

# `fkdpipe` with units of a few images. With TWICE, two processes of it at once, and a pause in each
# unit so that they really overlap; forked, since to import everything takes longest. With SEEDS,
# each of the two has another seed.
FEW_IMAGES = """
import os
import sys
import time

from fkdpipe.cli import main
from fkdpipe.labelgen import generate, plan, unit
from fkdpipe.storage import schema

schema.UNIT_IMAGES = 8
if "TWICE" not in os.environ:
    main()
plain = unit.Unit.make
unit.Unit.make = lambda self, *args: (time.sleep(0.2), plain(self, *args))[1]
children = []
for seed in range(2):
    child = os.fork()
    if not child:
        sys.argv += ["--seed", str(seed)] if "SEEDS" in os.environ else []
        main()
    children.append(child)
print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
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
def generate(tmp_path, folder, checkpoint):
    """generate(store, launcher, **environment): the ended process."""
    script = tmp_path / "few_images.py"
    script.write_text(FEW_IMAGES)

    def run(store: Path, *launcher: str, **environment: str) -> subprocess.CompletedProcess:
        words = [
            sys.executable, *launcher, str(script), "generate", str(folder), str(store),
            "--teacher", f"test_resnet={checkpoint}", "--source", "t", "--form", "topk:3",
            "--crops", "4", "--batch-size", "16", "--set", "threads=1",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(words, capture_output=True, text=True, env=environment)

    return run


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
def test_torchrun_gives_the_store_of_one_process(tmp_path, whole, generate):
    """`--part 1/2` and `--part 2/2` as processes: benchmarks/crash.py."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    made = generate(tmp_path / "store", *launcher)
    assert made.returncode == 0, made.stderr
    assert_same(open_store(tmp_path / "store"), whole)


@pytest.mark.slow
def test_two_processes_started_on_the_same_part_are_never_mixed(tmp_path, whole, generate):
    place = tmp_path / "store"
    shutil.copytree(whole.url, place)
    for kind in ("labels/t", "crops"):  # the list of images is there, everything else is missing
        shutil.rmtree(place / "rounds" / "0" / kind)
        shutil.rmtree(place / "commits" / "rounds" / "0" / kind)
    made = generate(place, TWICE="yes")
    assert made.stdout.splitlines()[-1] == "[0, 1]", made.stderr
    assert "is being written by process" in made.stderr
    assert "Traceback" not in made.stderr
    assert_same(open_store(place), whole)


@pytest.mark.slow
def test_of_two_starts_with_other_seeds_one_wins_and_one_is_refused(tmp_path, generate):
    """On an empty folder, where both list the images at the same time."""
    made = generate(tmp_path / "store", TWICE="yes", SEEDS="yes")
    assert made.stdout.splitlines()[-1] == "[0, 1]", made.stderr
    assert "Traceback" not in made.stderr
    store = open_store(tmp_path / "store")
    assert not verify.verify(store, full=True)
    (crops,) = store.rounds()
    assert crops.settings.seed == store.facts["order_seed"]
    loser = 1 - crops.settings.seed
    assert f"seed: {crops.settings.seed}, now {loser}" in made.stderr
