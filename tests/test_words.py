"""Numbers in messages."""

from __future__ import annotations

import shutil

import pytest
from pipeline import make_store

from fkdpipe.errors import StoreError, UnsealedStoreError
from fkdpipe.storage import cache, schema, words
from fkdpipe.storage.store import Store


def test_sizes_and_counts_read_well():
    assert [words.size(n) for n in (0, 999, 2048, 5e6, 3.2e9, 2e12)] == [
        "0 bytes", "999 bytes", "2.0 kB", "5.0 MB", "3.2 GB", "2.0 TB",
    ]  # fmt: skip
    assert words.count(1, "unit") == "1 unit"
    assert words.count(1200, "unit") == "1,200 units"


def test_a_full_cache_and_an_open_store_say_what_is_so(tmp_path, folder, teacher, monkeypatch):
    store = make_store(tmp_path / "store", folder, [teacher])
    usage = shutil.disk_usage(tmp_path)._replace(free=900)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(StoreError, match=r"needs [\d.]+ kB and .* has 900 bytes free"):
        cache._require_space(store, schema.crop_fields(), 4, tmp_path)
    part = store.part("rounds/0/crops")
    store.location.delete("commits/rounds/0/crops/manifest.json")
    with pytest.raises(UnsealedStoreError, match=r"1 unit made, and what closes it is missing"):
        Store(store.location).sealed(part)
