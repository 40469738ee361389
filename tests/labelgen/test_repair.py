"""Damage of every file is found, not served, and mended byte for byte."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from pipeline import CPU, make_store

from fkdpipe.cli import cli
from fkdpipe.common.errors import ClaimedError, DamagedStoreError, FkdpipeError, StoreError
from fkdpipe.labelgen import generate, plan, repair
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.storage import reader, verify
from fkdpipe.storage import repair as store_repair
from fkdpipe.storage.claims import Claim
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.store import Store, open_store

SETTINGS = GenerateSettings(teacher=("t",), crops=4, source="t", form="topk:3", features=("post",))


@pytest.fixture(scope="module")
def taught(teacher, checkpoint):
    from conftest import load_teacher

    return load_teacher(checkpoint, needs=SETTINGS.needs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder, taught):
    """A store of four units, labels and features, and its bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 16)
        store = make_store(
            tmp_path_factory.mktemp("whole") / "store", folder, [taught], features=("post",)
        )
    assert store.num_units == 4
    return store, contents(store)


def contents(store: Store) -> dict[str, bytes]:
    return {key: store.location.read(key) for key, _ in store.location.list()}


def copy(whole, tmp_path) -> LocalLocation:
    shutil.copytree(whole[0].url, tmp_path / "store")
    return LocalLocation(tmp_path / "store")


def mended(location, folder, taught) -> dict[str, bytes]:
    restored = repair.restore(location, folder)
    made = plan.prepare(location, folder, SETTINGS, [taught], device=CPU)
    again = repair.withdraw(made, restored)
    resources = generate.Resources(device=CPU, batch=5, batch_of=again.batch_of)
    generate.generate(made, [taught], resources)  # another batch: the recorded one must be taken
    store = Store(location)
    assert not verify.verify(store, full=True)
    return contents(store)


def one_of_each_kind(store) -> list[str]:
    """A key of every kind of object of a store."""
    kinds = {}
    for key, _ in store.location.list():
        words = ["#" if word.isdigit() else word for word in key.split("/")]
        if words[-1].removesuffix(".json").isdigit():
            words[-1] = "unit.json"
        kinds.setdefault("/".join(words), key)
    return sorted(kinds.values())


def damage(location, key: str, how: str) -> None:
    path = location.root / key
    data = path.read_bytes()
    if how == "flip":
        place = len(data) * 2 // 3
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
    elif how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_any_damaged_object_is_found_not_served_and_mended_to_the_byte(
    whole, tmp_path, folder, taught, how, capfd
):
    keys = one_of_each_kind(whole[0])
    assert len(keys) > 25
    for number, key in enumerate(keys):
        place = tmp_path / str(number)
        location = copy(whole, place)
        damage(location, key, how)
        assert problems_of(location), key
        assert not serves(location, place, whole[0]), key
        assert mended(location, folder, taught) == whole[1], key
        shutil.rmtree(place)
    capfd.readouterr()


def problems_of(location) -> list:
    try:
        return verify.verify(Store(location), full=True)
    except FkdpipeError as error:
        return [error]


def serves(location, tmp_path, original) -> bool:
    """Does a reader hand out labels that differ from the original's, without complaint?"""
    try:
        store = Store(location)
        found = reader.finished(store, [("labels", "t", ""), ("features", "t", "post")])
        rows = np.arange(original.num_images)
        boxes = reader.CropReader(store, found.crops, tmp_path / "cache").take(rows, np.arange(4))
        sparse = reader.CachedFields(store, found.labels[0], tmp_path / "cache")
        values = [
            boxes.box_NM4,
            boxes.flip_NM,
            *(sparse.take(n, rows, np.arange(4)) for n in ("ids", "prob")),
        ]
        values += [store.images.keys, store.images.size_N2]
        values += features(store, found)
    except FkdpipeError:
        return False
    fine = reader.finished(original, [("labels", "t", ""), ("features", "t", "post")])
    plain = reader.CropReader(original, fine.crops, tmp_path / "fine").take(rows, np.arange(4))
    kept = reader.CachedFields(original, fine.labels[0], tmp_path / "fine")
    expected = [
        plain.box_NM4,
        plain.flip_NM,
        *(kept.take(n, rows, np.arange(4)) for n in ("ids", "prob")),
    ]
    expected += [original.images.keys, original.images.size_N2]
    expected += features(original, fine)
    return not all(np.array_equal(a, b) for a, b in zip(values, expected, strict=True))


def features(store, found) -> list[np.ndarray]:
    wide = reader.WideReader(store, found.labels[1], "value")
    return [wide.unit(unit, np.arange(4)) for unit in range(store.num_units)]


def test_swapped_and_forged_objects_are_found(whole, tmp_path, folder, taught):
    location = copy(whole, tmp_path)
    a, b = (location.root / f"rounds/0/labels/t/ids/c/{unit}/0/0" for unit in (0, 1))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    codes = {(p.code, p.unit) for p in verify.verify(Store(location), full=True)}
    assert {unit for code, unit in codes if code in ("checksum", "length")} == {0, 1}
    assert mended(location, folder, taught) == whole[1]
    marker = location.root / "commits/rounds/0/labels/t/2.json"
    marker.write_bytes((location.root / "commits/rounds/0/labels/t/1.json").read_bytes())
    (problem,) = verify.verify(Store(location))
    assert (problem.code, problem.unit) == ("marker-changed", 2)
    assert mended(location, folder, taught) == whole[1]


def test_a_marker_forged_for_missing_data_is_found(whole, tmp_path, folder, taught):
    """A unit whose files were exchanged together with an honest-looking marker."""
    from fkdpipe.storage import commits

    location = copy(whole, tmp_path)
    store = Store(location)
    part = store.part("rounds/0/labels/t")
    marker = store.marker(part, 3)
    forged = commits.Marker(
        part.path, 3, marker.settings, dict.fromkeys(marker.files, (1, "00000000")), {}, {}
    )
    location.write(commits.marker_key(part.path, 3), forged.to_bytes())
    assert {p.code for p in verify.verify(store)} >= {"marker-changed"}
    assert mended(location, folder, taught) == whole[1]


def test_every_code_that_verify_gives_is_documented():
    import ast
    import inspect
    from pathlib import Path

    from fkdpipe.labelgen import check

    given = set()
    for module in (verify, check):
        for node in ast.walk(ast.parse(Path(inspect.getfile(module)).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Problem":
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    given.add(first.value)
    assert given <= set(verify.CODES)


def test_quick_verify_sees_lengths_and_markers_but_reads_no_data(whole, tmp_path, monkeypatch):
    location = copy(whole, tmp_path)
    damage(location, "rounds/0/labels/t/prob/c/1/0/0", "truncate")
    damage(location, "commits/rounds/0/crops/2.json", "delete")
    damage(location, "rounds/0/labels/t/ids/c/1/0/0", "flip")
    found = verify.verify(Store(location))
    assert {(p.code, p.part, p.unit) for p in found} == {
        ("length", "rounds/0/labels/t", 1),
        ("missing-unit", "rounds/0/crops", 2),
    }
    everything = verify.verify(Store(location), full=True)
    assert ("checksum", 1) in {(p.code, p.unit) for p in everything}


def test_a_list_of_images_that_cannot_be_made_again_is_said(whole, tmp_path, folder, taught, cut):
    location = copy(whole, tmp_path)
    damage(location, "images/key/c/0", "flip")
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    cut(99, 50, 50).save(data / "train" / "ash" / "new.jpg")
    with pytest.raises(StoreError, match="no longer holds the images"):
        repair.restore(location, data)
    assert mended(location, folder, taught) == whole[1]


def test_mending_a_sound_store_changes_nothing(whole, tmp_path):
    location = copy(whole, tmp_path)
    assert store_repair.metadata(location) == []
    assert store_repair.records(Store(location)) == []
    assert contents(Store(location)) == whole[1]


def test_damage_while_reading_names_the_unit_and_the_command(whole, tmp_path):
    location = copy(whole, tmp_path)
    damage(location, "rounds/0/features/t/post/value/c/2/0/0", "flip")
    store = open_store(location.root)
    found = reader.finished(store, [("features", "t", "post")])
    wide = reader.WideReader(store, found.labels[0], "value")
    wide.unit(1, np.arange(4))
    with pytest.raises(DamagedStoreError, match=r"unit 2.*--repair") as raised:
        wide.unit(2, np.arange(4))
    assert raised.value.unit == 2


def test_a_repair_makes_its_own_parts_and_names_the_others(
    tmp_path, folder, teacher, checkpoint, monkeypatch
):
    monkeypatch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 16)
    for source in ("a", "b"):
        store = make_store(tmp_path / "store", folder, [teacher], source=source)
    before = contents(store)
    for source in ("a", "b"):
        damage(store.location, f"rounds/0/labels/{source}/ids/c/1/0/0", "flip")
    words = [
        "generate", folder, store.url, "--repair", "--teacher", f"test_resnet={checkpoint}"
    ]  # fmt: skip
    bare = CliRunner().invoke(cli, list(map(str, words[:4])))
    assert bare.exit_code == 2
    for source in ("a", "b"):
        assert f"--form topk:3 --source {source} --precision float32" in bare.stderr
    refused = CliRunner().invoke(cli, [*map(str, words), "--source", "a", "--part", "1/2"])
    assert refused.exit_code == 2
    made = CliRunner().invoke(cli, [*map(str, words), "--source", "a"])
    assert made.exit_code == 0, made.output
    assert "1 unit regenerated" in made.stdout
    assert "rounds/0/labels/b: 1 unit still damaged" in made.stdout
    found = verify.verify(Store(store.location), full=True)
    assert [(p.code, p.part, p.unit) for p in found] == [("checksum", "rounds/0/labels/b", 1)]
    made = CliRunner().invoke(cli, [*map(str, words), "--source", "b"])
    assert "still damaged" not in made.stdout
    assert contents(store) == before


def test_a_repair_waits_for_nobody_and_disturbs_nobody(whole, tmp_path, folder):
    location = copy(whole, tmp_path)
    damage(location, "rounds/0/labels/t/ids/c/1/0/0", "flip")
    before = {key: location.read(key) for key, _ in location.list()}
    with Claim(location, 1, 3), pytest.raises(ClaimedError, match="is being written by process"):
        repair.restore(location, folder)
    assert {key: location.read(key) for key, _ in location.list()} == before


def test_a_repair_need_not_be_told_what_the_store_records(tmp_path, folder, checkpoint):
    from conftest import load_teacher

    taught = load_teacher(checkpoint, needs=SETTINGS.needs)
    store = make_store(
        tmp_path / "store", folder, [taught], form="none", features=("post",), features_code="int8",
        seed=4,
    )  # fmt: skip
    before = contents(store)
    shard = next(
        key for key in before if key.startswith("rounds/0/features/t/post/") and "/c/" in key
    )
    damage(store.location, shard, "flip")
    words = ["generate", folder, store.url, "--repair", "--teacher", f"test_resnet={checkpoint}"]
    made = CliRunner().invoke(cli, list(map(str, words)))
    assert made.exit_code == 0, made.output
    assert contents(store) == before
