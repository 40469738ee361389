"""The store: layout, commits, reading; damage is never served."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import zarr
from random_store import (
    CLASSES,
    CROPS,
    IMAGES,
    UNIT,
    flip_bit,
    make_store,
    random_labels,
)

from fkdpipe.common.errors import (
    DamagedStoreError,
    StoreError,
    StoreMismatchError,
    UnsealedStoreError,
)
from fkdpipe.pixels import crops
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import cache, commits, labels, reader, rounds, schema, writer
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.store import Store, open_store


@pytest.fixture
def store(tmp_path) -> Store:
    return make_store(tmp_path / "store")


def test_any_zarr_reader_can_open_it(tmp_path):
    make_store(tmp_path / "store")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # only codecs and dtypes of the specification
        arrays = {
            name: zarr.open_array(store=str(tmp_path / "store"), path=name, mode="r")
            for name in ("images/key", "rounds/0/crops/box", "rounds/0/labels/t/ids")
        }
    assert arrays["images/key"].shape == (IMAGES,)
    assert arrays["rounds/0/crops/box"].shards == (UNIT, CROPS, 4)
    ids = arrays["rounds/0/labels/t/ids"][:]
    assert ids.shape == (IMAGES, CROPS, 5)
    assert ids.max() < CLASSES


def test_images_keep_their_rows_together_in_a_random_order(store):
    listed = store.images
    numbers = [int(key.split("/")[1].removesuffix(".jpg")) for key in listed.keys]
    assert sorted(numbers) == list(range(IMAGES))
    assert numbers != list(range(IMAGES))
    assert [n % 7 for n in numbers] == listed.class_N.tolist()
    assert listed.rejected == (("c1/bad.png", "16-bit", "16-bit PNG"),)
    assert listed.class_names == tuple(f"c{k}" for k in range(7))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_arrays_of_nothing_but_fill_values_are_stored_too(tmp_path, flip):
    store = make_store(tmp_path / "store", flip=flip)
    found = reader.finished(store, [])
    boxes = reader.CropReader(store, found.crops, tmp_path / "cache")
    assert (boxes.take(np.arange(IMAGES), np.arange(CROPS)).flip_NM == bool(flip)).all()


@pytest.mark.parametrize("derived", [False, True])
def test_the_reader_gives_back_every_crop(tmp_path, derived):
    store = make_store(tmp_path / "store", derived=derived)
    assert (store.location.length("rounds/0/crops/box/c/0/0/0") is None) is derived
    found = reader.finished(store, [("labels", "t", "")])
    boxes = reader.CropReader(store, found.crops, tmp_path / "cache")
    listed = store.images
    expected = crops.sample(
        CropDistribution(),
        seed=3,
        image_id_N=crops.image_ids(list(listed.keys)),
        size_N2=listed.size_N2,
        crops_M=np.arange(CROPS),
    )
    rows = np.random.default_rng(0).permutation(IMAGES)[:40]
    recorded = boxes.take(rows, np.array([7, 8, 9, 0]))
    box, flip = recorded.box_NM4, recorded.flip_NM
    assert np.array_equal(box, expected.box_NM4[rows][:, [7, 8, 9, 0]])
    assert np.array_equal(flip, expected.flip_NM[rows][:, [7, 8, 9, 0]])


@pytest.mark.parametrize("form", ["topk:5", "topk:5:compact", "hard"])
def test_sparse_labels_are_those_zarr_reads(tmp_path, form):
    store = make_store(tmp_path / "store", form=form)
    found = reader.finished(store, [("labels", "t", "")])
    sparse = reader.SparseReader(store, found.labels[0], tmp_path / "cache")
    rows, which = np.array([149, 3, 64]), np.array([2, 3])
    made = sparse.take(rows, which, labels.Target("hard"))
    ids = zarr.open_array(store=store.url, path="rounds/0/labels/t/ids", mode="r")[:]
    assert np.array_equal(made.ids_BK[:, 0], ids[rows][:, which, 0].ravel())


@pytest.mark.parametrize("form", ["full", "logits"])
def test_wide_labels_are_streamed_by_crop_group(tmp_path, form, monkeypatch):
    store = make_store(tmp_path / "store", form=form)
    found = reader.finished(store, [("labels", "t", "")])
    name = "log_prob" if form == "full" else "logit"
    whole = zarr.open_array(store=store.url, path=f"rounds/0/labels/t/{name}", mode="r")[:]
    wide = reader.WideReader(store, found.labels[0], name)
    read: list[str] = []
    plain = Store.read_checked
    monkeypatch.setattr(
        Store, "read_checked", lambda s, key, *a: (read.append(key), plain(s, key, *a))[1]
    )
    for crops_m, groups in [([4, 5, 6, 7], 1), ([2], 1), ([8, 9, 0, 1], 2), ([3, 4], 2)]:
        read.clear()
        for unit in range(store.num_units):
            made = wide.unit(unit, np.array(crops_m))
            assert np.array_equal(made, whole[store.unit_rows(unit)][:, crops_m], equal_nan=True)
        assert len(read) == groups * store.num_units


def test_an_unsealed_store_is_refused_unless_its_finished_part_is_asked_for(tmp_path):
    store = make_store(tmp_path / "store", seal=False)
    with pytest.raises(UnsealedStoreError, match=r"not finished \(2 of 3 units\)"):
        reader.finished(store, [("labels", "t", "")])
    found = reader.finished(store, [("labels", "t", "")], allow_partial=True)
    assert found.rows.tolist() == list(range(2 * UNIT))


def test_an_unknown_source_is_named(store):
    with pytest.raises(StoreError, match="it has t"):
        reader.finished(store, [("labels", "other", "")])
    assert reader.choose_source(store, None) == "t"


def test_no_store_no_traceback(tmp_path):
    with pytest.raises(StoreError, match="is not a store"):
        open_store(tmp_path)
    zarr.create_group(store=str(tmp_path / "other"))
    with pytest.raises(StoreError, match="not an fkdpipe store"):
        open_store(tmp_path / "other")


def test_a_newer_format_is_refused(store, tmp_path):
    file = tmp_path / "store" / "zarr.json"
    facts = json.loads(file.read_text())
    facts["attributes"]["fkdpipe"]["version"] = 99
    file.write_text(json.dumps(facts))
    with pytest.raises(StoreError, match="format version 99"):
        open_store(tmp_path / "store")


def test_other_settings_are_refused_and_named(store):
    settings = replace(store.part("rounds/0/labels/t").settings, temperature=2.0)
    fields = schema.label_fields(labels.parse_form("topk:5"), CLASSES)
    with pytest.raises(StoreMismatchError, match=r"temperature: 1\.0, now 2\.0"):
        writer.add_part(store, "rounds/0/labels/t", settings, fields)
    with pytest.raises(StoreMismatchError, match="seed: 3, now 4"):
        writer.add_crops(store, CropDistribution(), seed=4, count=CROPS)


def test_a_flipped_bit_is_found_and_not_served(store, tmp_path):
    key = "rounds/0/labels/t/prob/c/1/0/0"
    flip_bit(tmp_path / "store" / key)
    found = reader.finished(store, [("labels", "t", "")])
    with pytest.raises(DamagedStoreError, match=r"unit 1.*fkdpipe verify") as raised:
        reader.SparseReader(store, found.labels[0], tmp_path / "cache")
    assert raised.value.unit == 1
    left = [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")]
    assert left == []


def test_the_cache_is_made_once_and_checked_at_every_start(store, tmp_path, caplog):
    found = reader.finished(store, [("labels", "t", "")])
    part, manifest = found.crops[0].part, found.crops[0].manifest
    first = cache.fill(store, part, manifest, tmp_path / "cache")
    expected = np.array(first["box"])
    folder = cache.folder_of(tmp_path / "cache", part, manifest)
    stamp = (folder / "box.npy").stat().st_mtime_ns
    cache.fill(store, part, manifest, tmp_path / "cache")
    assert (folder / "box.npy").stat().st_mtime_ns == stamp
    del first
    flip_bit(folder / "box.npy", 500)
    assert cache.check(folder) == ["box.npy has changed"]
    again = cache.fill(store, part, manifest, tmp_path / "cache")
    assert np.array_equal(again["box"], expected)


def test_another_store_never_shares_a_cache(tmp_path):
    for seed in (0, 1):
        store = make_store(tmp_path / f"store{seed}", seed=seed)
        found = reader.finished(store, [("labels", "t", "")])
        reader.SparseReader(store, found.labels[0], tmp_path / "cache")
    folders = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert len(folders) == 2


def test_rounds_follow_one_another(tmp_path):
    store = make_store(tmp_path / "store")
    part = writer.add_crops(store, CropDistribution(), seed=3, count=4)
    assert part.path == "rounds/1/crops"
    settings = replace(store.part("rounds/0/labels/t").settings, crops=4)
    fields = schema.label_fields(labels.parse_form("topk:5"), CLASSES)
    taught = writer.add_part(store, "rounds/1/labels/t", settings, fields)
    random = np.random.default_rng(9)
    for unit in range(store.num_units):
        drawn = rounds.draw(store, part, unit)
        values = {"box": drawn.box_NM4, "flip": drawn.flip_NM}
        made = {"crops_crc32c": rounds.checksum(drawn)}
        writer.commit_unit(store, part, unit, values, facts=made)
        values = random_labels(store, taught, unit, random)
        writer.commit_unit(store, taught, unit, {k: v[:, :4] for k, v in values.items()})
    assert writer.seal(store, part)
    assert writer.seal(store, taught)
    found = reader.finished(store, [("labels", "t", "")])
    assert found.crops_per_image == CROPS + 4
    boxes = reader.CropReader(store, found.crops, tmp_path / "cache")
    expected = crops.sample(
        CropDistribution(),
        seed=3,
        image_id_N=crops.image_ids(list(store.images.keys)),
        size_N2=store.images.size_N2,
        crops_M=np.array([9, 10, 13, 0]),
    )
    box = boxes.take(np.arange(IMAGES), np.array([9, 10, 13, 0])).box_NM4
    assert np.array_equal(box, expected.box_NM4)


def test_records_refuse_what_they_did_not_write():
    data = commits.seal_record({"part": "x", "unit": 1})
    assert commits.open_record(data) == {"part": "x", "unit": 1}
    for bad in (b"", b"{}", b"[1]", data[:-1], data.replace(b"1", b"2", 1), data + b" "):
        with pytest.raises(commits.BrokenRecordError):
            commits.open_record(bad)


def test_a_write_is_complete_or_absent(tmp_path, monkeypatch):
    location = LocalLocation(tmp_path)
    location.write("a/b", b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="disk is full"):
        location.write("a/b", b"new")
    monkeypatch.undo()
    assert location.read("a/b") == b"old"
    assert [key for key, _ in location.list()] == ["a/b"]


def test_create_refuses_what_exists(tmp_path):
    location = LocalLocation(tmp_path)
    assert location.create("x", b"1")
    assert not location.create("x", b"2")
    assert location.read("x") == b"1"


def test_differences_name_nested_settings():
    old = {"a": 1, "t": [{"name": "x", "size": [1, 2]}], "same": 0}
    new = {"a": 2, "t": [{"name": "y", "size": [1, 2]}], "same": 0, "b": True}
    assert schema.differences(old, new) == [
        "a: 1, now 2",
        "b: none, now True",
        "t.0.name: x, now y",
    ]
