"""A store that is there is never written over: whoever comes first decides what it is."""

from __future__ import annotations

import os
import shutil

import pytest
from pipeline import make_store

from fkdpipe.common.errors import DamagedStoreError, StoreMismatchError
from fkdpipe.pixels import images
from fkdpipe.storage import thin, verify, writer
from fkdpipe.storage.location import LocalLocation, open_location
from fkdpipe.storage.store import open_store
from fkdpipe.storage.thin import Subset


@pytest.fixture
def renamed(tmp_path, folder):
    """The same folder with one image under another name."""
    data = tmp_path / "renamed"
    shutil.copytree(folder, data)
    (data / "train" / "ash" / "0.jpg").rename(data / "train" / "ash" / "other.jpg")
    return data


def contents(place) -> dict[str, bytes]:
    location = LocalLocation(place)
    return {key: location.read(key) for key, _ in location.list()}


def test_thinning_onto_another_store_is_refused_and_leaves_it_alone(
    tmp_path, folder, teacher, renamed
):
    first = make_store(tmp_path / "first", folder, [teacher])
    make_store(tmp_path / "second", renamed, [teacher])
    before = contents(tmp_path / "second")
    with pytest.raises(StoreMismatchError, match="fingerprint"):
        thin.thin(first, open_location(tmp_path / "second"), Subset(crops=2))
    assert contents(tmp_path / "second") == before
    assert not verify.verify(open_store(tmp_path / "second"), full=True)


def test_a_thinned_store_is_not_taken_for_that_of_other_images(tmp_path, folder, teacher, renamed):
    first = make_store(tmp_path / "first", folder, [teacher])
    second = make_store(tmp_path / "second", renamed, [teacher])
    thin.thin(first, open_location(tmp_path / "thin"), Subset(crops=2))
    before = contents(tmp_path / "thin")
    with pytest.raises(StoreMismatchError, match="fingerprint"):
        thin.thin(second, open_location(tmp_path / "thin"), Subset(crops=2))
    assert contents(tmp_path / "thin") == before


@pytest.mark.parametrize("key", ["commits/images/0.json", "commits/images/part.json", "zarr.json"])
@pytest.mark.parametrize("how", ["flip", "delete"])
def test_a_damaged_record_of_the_images_never_begins_the_store_anew(
    tmp_path, folder, teacher, renamed, key, how
):
    make_store(tmp_path / "store", folder, [teacher])
    file = tmp_path / "store" / key
    data = file.read_bytes()
    place = data.index(b'"images"') + 3 if b'"images"' in data else len(data) // 2
    file.unlink()
    if how == "flip":
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    before = contents(tmp_path / "store")
    refused = (
        StoreMismatchError
        if (key, how) == ("commits/images/0.json", "delete")  # nothing says that it was finished
        else DamagedStoreError
    )
    with pytest.raises(refused, match=r"fingerprint|--repair"):
        make_store(tmp_path / "store", renamed, [teacher])
    assert contents(tmp_path / "store") == before


def test_whoever_finishes_the_scan_later_is_refused(tmp_path, folder, teacher, monkeypatch):
    plain = images.scan

    def slow(*args, **how):
        found = plain(*args, **how)
        monkeypatch.setattr(images, "scan", plain)
        make_store(tmp_path / "store", folder, [teacher], seed=1)
        return found

    monkeypatch.setattr(images, "scan", slow)
    with pytest.raises(StoreMismatchError, match="order_seed: 1, now 0"):
        make_store(tmp_path / "store", folder, [teacher], seed=0)
    assert not verify.verify(open_store(tmp_path / "store"), full=True)


def test_two_starts_of_one_part_with_other_settings_are_never_mixed(
    tmp_path, folder, teacher, monkeypatch
):
    """Both have looked, and neither found the part."""
    plain = writer.add_part

    def late(store, path, *args, **how):
        if path == "rounds/0/labels/t":
            monkeypatch.setattr(writer, "add_part", plain)
            make_store(tmp_path / "store", folder, [teacher], form="topk:2")
        return plain(store, path, *args, **how)

    monkeypatch.setattr(writer, "add_part", late)
    with pytest.raises(StoreMismatchError, match="form: topk:2, now topk:3"):
        make_store(tmp_path / "store", folder, [teacher], form="topk:3")
    assert not verify.verify(open_store(tmp_path / "store"), full=True)


def test_a_list_of_images_that_was_cut_off_before_its_seal_is_sealed_later(
    tmp_path, folder, teacher
):
    store = make_store(tmp_path / "store", folder, [teacher])
    before = contents(tmp_path / "store")
    store.location.delete("commits/images/manifest.json")
    make_store(tmp_path / "store", folder, [teacher])
    assert contents(tmp_path / "store") == before


@pytest.mark.parametrize("links", [True, False])
def test_a_name_is_taken_once_and_leaves_no_other_file(tmp_path, monkeypatch, links):
    def refuse(*args):
        raise PermissionError(1, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    location = LocalLocation(tmp_path / "store")
    assert location.create("a/b", b"first")
    assert not location.create("a/b", b"second")
    assert location.read("a/b") == b"first"
    assert [key for key, _ in location.list()] == ["a/b"]
