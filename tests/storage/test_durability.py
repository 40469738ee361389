"""What disks, other programs and power cuts do to a store, and what is said about it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import load_teacher
from pipeline import make_store

from fkdpipe.cli import cli
from fkdpipe.common.errors import DamagedStoreError, FkdpipeError, StoreError
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.storage import cache, commits, reader, verify, writer
from fkdpipe.storage import location as locations
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.store import Store, open_store

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def few_images(monkeypatch):
    """Units of 16 images: four of them."""
    monkeypatch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder, teacher) -> Store:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 16)
        place = tmp_path_factory.mktemp("whole") / "store"
        make_store(place, folder, [teacher])
        return make_store(place, folder, [teacher], source="wide", form="full")


def contents(store: Store) -> dict[str, bytes]:
    return {key: store.location.read(key) for key, _ in store.location.list()}


def generate(folder, store, checkpoint):
    """`fkdpipe generate` as the fixture `whole` made its first source."""
    words = [
        "generate", folder, store, "--teacher", f"test_resnet={checkpoint}", "--source", "t",
        "--form", "topk:3", "--crops", "4", "--batch-size", "16",
    ]  # fmt: skip
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "permission denied")]
)
def test_a_disk_that_takes_no_more_gives_one_line_and_loses_nothing(
    tmp_path, folder, checkpoint, few_images, monkeypatch, number, said
):
    plain, second = os.fsync, tmp_path / "store/commits/rounds/0/labels/t/1.json"

    def full(descriptor):
        if second.exists():
            raise OSError(number, os.strerror(number))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    made = generate(folder, tmp_path / "store", checkpoint)
    monkeypatch.setattr(os, "fsync", plain)
    assert made.exit_code == 1
    (line,) = [line for line in made.stderr.splitlines() if "Error" in line]
    assert said in line
    assert "start the same command again" in line
    store = open_store(tmp_path / "store")
    part = store.part("rounds/0/labels/t")
    done = {unit: marker for unit, marker in store.markers(part) if marker is not None}
    assert 0 < len(done) < store.num_units
    committed = {key: store.location.read(key) for marker in done.values() for key in marker.files}
    assert generate(folder, tmp_path / "store", checkpoint).exit_code == 0
    assert {key: store.location.read(key) for key in committed} == committed
    assert not verify.verify(open_store(tmp_path / "store"), full=True)


def test_a_shard_removed_behind_the_writers_back_keeps_the_part_unsealed(
    tmp_path, folder, teacher, few_images, monkeypatch, whole
):
    plain = writer.commit_unit

    def meddle(store, part, unit, values, **how):
        marker = plain(store, part, unit, values, **how)
        if part.kind == "labels" and unit == 2:
            store.location.delete("rounds/0/labels/t/ids/c/0/0/0")
        return marker

    monkeypatch.setattr(writer, "commit_unit", meddle)
    with pytest.raises(
        DamagedStoreError, match=r"unit 0\).*same `fkdpipe generate` again"
    ) as raised:
        make_store(tmp_path / "store", folder, [teacher])
    assert raised.value.unit == 0
    store = open_store(tmp_path / "store")
    assert store.manifest(store.part("rounds/0/labels/t")) is None
    monkeypatch.setattr(writer, "commit_unit", plain)
    made = make_store(tmp_path / "store", folder, [teacher])
    assert not verify.verify(made, full=True)
    for key, data in contents(made).items():
        assert data == whole.location.read(key), key


def test_a_write_flushes_every_folder_up_to_the_store(tmp_path, monkeypatch):
    """Also folders that another process made and had no time to flush."""
    location = LocalLocation(tmp_path / "store")
    (tmp_path / "store" / "a" / "b").mkdir(parents=True)
    flushed = []
    monkeypatch.setattr(locations, "_sync_folder", lambda folder: flushed.append(folder))
    location.write("a/b/c", b"1")
    assert {tmp_path / "store" / "a" / "b", tmp_path / "store" / "a", tmp_path / "store"} <= {
        *flushed
    }


def test_crc32c_is_blind_to_data_that_end_with_their_own_and_the_file_table_is_not():
    a, b = (np.random.default_rng(seed).bytes(100) for seed in (0, 1))
    ended = [data + google_crc32c.value(data).to_bytes(4, "little") for data in (a, b)]
    assert len({google_crc32c.value(data) for data in ended}) == 1
    assert len({commits.entry(data) for data in ended}) == 2


def test_wide_shards_that_changed_places_are_found_and_not_served(tmp_path, whole):
    """They are not compressed, so all have the same length."""
    shutil.copytree(whole.url, tmp_path / "store")
    a, b = (tmp_path / f"store/rounds/0/labels/wide/log_prob/c/{unit}/0/0" for unit in (0, 1))
    first, second = a.read_bytes(), b.read_bytes()
    assert len(first) == len(second)
    a.write_bytes(second)
    b.write_bytes(first)
    store = open_store(tmp_path / "store")
    found = {(p.code, p.part, p.unit) for p in verify.verify(store, full=True)}
    assert found == {("checksum", "rounds/0/labels/wide", unit) for unit in (0, 1)}
    wide = reader.WideReader(
        store, reader.finished(store, [("labels", "wide", "")]).labels[0], "log_prob"
    )
    assert len(wide.units([2, 3], np.arange(4))) == 2
    for unit in (0, 1):
        with pytest.raises(DamagedStoreError):
            wide.units([3, unit], np.arange(4))


def test_units_read_together_are_those_read_one_by_one(whole):
    found = reader.finished(whole, [("labels", "wide", "")])
    wide = reader.WideReader(whole, found.labels[0], "log_prob")
    crops_m = np.array([1, 3])
    together = wide.units([3, 0, 2], crops_m)
    assert list(together) == [3, 0, 2]
    for unit, values in together.items():
        assert np.array_equal(values, wide.unit(unit, crops_m))


def test_an_object_that_cannot_be_read_is_a_problem_and_an_error(tmp_path, whole, monkeypatch):
    bad = "rounds/0/labels/t/ids/c/1/0/0"
    plain = Path.read_bytes

    def broken(path):
        if path.as_posix().endswith(bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    (problem,) = verify.verify(whole, full=True)
    assert (problem.code, problem.unit, problem.detail) == ("unreadable", 1, bad)
    found = reader.finished(whole, [("labels", "t", "")])
    with pytest.raises(StoreError, match="cannot be read: Input/output error"):
        reader.SparseReader(whole, found.labels[0], tmp_path / "cache")


def filled(whole: Store, cache_dir: Path) -> Path:
    """The cache folder of the boxes, filled."""
    found = reader.finished(whole, [])
    reader.CropReader(whole, found.crops, cache_dir)
    return cache.folder_of(cache_dir, found.crops[0].part, found.crops[0].manifest)


def test_verify_full_reports_damage_of_the_cache(tmp_path, whole):
    folder = filled(whole, tmp_path / "cache")
    words = ["verify", whole.url, "--full", "--json", "--cache", str(tmp_path / "cache")]
    assert CliRunner().invoke(cli, words).exit_code == 0
    data = bytearray((folder / "flip.npy").read_bytes())
    data[-1] ^= 1
    (folder / "flip.npy").write_bytes(bytes(data))
    made = CliRunner().invoke(cli, words)
    assert made.exit_code == 1
    (problem,) = json.loads(made.stdout)["problems"]
    assert (problem["code"], problem["part"]) == ("cache", "rounds/0/crops")
    assert "flip.npy has changed" in problem["detail"]


def test_a_cache_in_the_place_of_another_is_refused_and_filled_again(tmp_path, whole):
    folder = filled(whole, tmp_path / "cache")
    other = folder.with_name("0" * 32)
    folder.rename(other)
    shutil.copytree(other, folder)
    assert cache.check(folder) == []
    assert cache.check(other) == ["cache.json: belongs to another cache"]


def test_what_a_killed_reader_left_is_swept(tmp_path, whole):
    folder = filled(whole, tmp_path / "cache")
    shutil.rmtree(folder)
    left = folder.with_name(f"{folder.name}.999999999.partial")
    left.mkdir()
    (left / "box.npy").write_bytes(b"half")
    assert filled(whole, tmp_path / "cache") == folder
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_said(tmp_path, whole, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot be written.*--cache"):
        filled(whole, tmp_path / "file")

    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=r"No space left on device.*--cache"):
        filled(whole, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_unit_that_fits_neither_memory_nor_disk_is_said(tmp_path, folder, teacher, monkeypatch):
    monkeypatch.setattr("fkdpipe.storage.schema.UNIT_BUFFER_BYTES", 1000)

    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FkdpipeError, match=r"unit in progress needs .* TMPDIR"):
        make_store(tmp_path / "store", folder, [teacher], form="full")


def test_features_without_a_value_are_found(tmp_path, folder, checkpoint, few_images):
    needs = GenerateSettings(teacher=("t",), features=("post",), crops=4).needs
    taught = load_teacher(checkpoint, needs=needs)
    store = make_store(tmp_path / "store", folder, [taught], features=("post",))
    part = store.part("rounds/0/features/t/post")
    marker = store.marker(part, 1)
    values = store.read(part, "value", 1)
    values[3, 2, 1] = np.nan
    writer.commit_unit(store, part, 1, {"value": values}, facts=marker.facts)
    writer.seal(store, part)
    (problem,) = verify.verify(store, full=True)
    assert (problem.code, problem.part, problem.unit) == ("unfilled", part.path, 1)


def last_line(name: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_runs_lose_and_change_nothing():
    found = last_line("crash")
    assert found["kills"] >= 20
    assert found["kills_inside_write"] > 0
    wrong = ("lost_units", "changed_units", "remade_units", "stores_differing", "other_ends",
             "half_caches_served", "partials_left")  # fmt: skip
    assert {name: found[name] for name in wrong} == dict.fromkeys(wrong, 0)


@pytest.mark.slow
def test_damage_is_found_and_never_served():
    found = last_line("damage")
    assert found["found"] == found["injected"] >= 60
    assert found["served"] == 0
    assert found["repaired_identical"] == found["repaired"] > 0
