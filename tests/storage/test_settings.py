"""Settings of a part: read once, written back as they were; fields of a unit read in one way."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from random_store import CROPS, GROUP, flip_bit, make_store

from fkdpipe.common.errors import DamagedStoreError, StoreError, UnsealedStoreError
from fkdpipe.pixels.crops import CropDistribution, Jitter
from fkdpipe.storage import commits, settings
from fkdpipe.storage.labels import Form
from fkdpipe.storage.settings import CropsSettings, FeatureSettings, LabelSettings
from fkdpipe.storage.store import Store, open_store

DISTRIBUTION = CropDistribution(scale=(0.25, 1.0), jitter=Jitter(hue=0.1))
IMPORTED = CropsSettings("imported:fkd", 1, None, None, None, None, first=0, crops=3)
EXAMPLES = [
    CropsSettings.of(DISTRIBUTION, seed=3, count=4, first=8, derived=True),
    CropsSettings.of(CropDistribution(), seed=3, count=4),
    IMPORTED,
    LabelSettings(
        Form("topk", 5, compact=True), 1000, 4, teachers=({"name": "a", "size": [1, 2]},)
    ),
    LabelSettings(Form("hard", 1), 10, 4, temperature=None, imported_from={"format": "fkd"}),
    FeatureSettings("post", 64, 64, "float16", 4, pre_is_post=True),
    FeatureSettings("map", 8, 2, "int8", 4, shape=(2, 2, 2), teachers=({"name": "a"},)),
]


@pytest.mark.parametrize("made", EXAMPLES, ids=range(len(EXAMPLES)))
def test_settings_come_back_as_they_were(made):
    facts = json.loads(json.dumps(made.to_json()))
    assert settings.parse(made.kind, facts) == made
    newer = {**facts, "of_a_later_version": [1]}
    assert settings.parse(made.kind, newer).to_json() == newer
    for key in facts.keys() - {"jitter", "imported_from", "shape"}:
        with pytest.raises(KeyError):
            settings.parse(made.kind, {k: v for k, v in facts.items() if k != key})


def test_keys_are_those_of_the_format():
    crops, plain = (made.to_json() for made in EXAMPLES[:2])
    assert crops == {
        "law": "random-resized-crop", "version": 1, "scale": [0.25, 1.0], "ratio": [0.75, 4 / 3],
        "flip": 0.5, "seed": 3, "boxes": "derived", "first": 8, "crops": 4,
        "jitter": {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.1},
    }  # fmt: skip
    assert (plain["boxes"], "jitter" in plain) == ("stored", False)
    assert EXAMPLES[3].to_json()["form"] == "topk:5:compact"
    assert "imported_from" not in EXAMPLES[3].to_json()
    assert (EXAMPLES[6].to_json()["tap"], EXAMPLES[6].to_json()["shape"]) == ("map", [2, 2, 2])


def test_only_a_known_distribution_can_be_drawn_again():
    assert EXAMPLES[0].distribution == DISTRIBUTION
    assert IMPORTED.imported
    assert not IMPORTED.known
    facts = {**EXAMPLES[1].to_json(), "version": 2}
    for made in (IMPORTED, CropsSettings.from_json(facts)):
        with pytest.raises(StoreError, match="cannot draw"):
            _ = made.distribution


@pytest.mark.parametrize(("key", "value"), [("form", "topk:0"), ("classes", None)])
def test_a_part_that_cannot_be_understood_is_named(tmp_path, key, value):
    store = make_store(tmp_path / "store")
    part = store.part("rounds/0/labels/t")
    name = f"{part.path}/zarr.json"
    group = json.loads(part.metadata[name])
    facts = group["attributes"]["fkdpipe"]["settings"]
    facts.pop(key)
    if value is not None:
        facts[key] = value
    metadata = {name: text.decode() for name, text in part.metadata.items()}
    metadata[name] = json.dumps(group)
    store.location.write(name, metadata[name].encode())
    record = commits.seal_record({"metadata": metadata})
    store.location.write(commits.part_key(part.path), record)
    with pytest.raises(DamagedStoreError, match=rf"part\.json is invalid.*{key}"):
        _ = open_store(tmp_path / "store").parts


@pytest.mark.parametrize(("form", "field"), [("topk:5", "prob"), ("full", "log_prob")])
def test_a_field_of_a_unit_is_read_in_the_order_asked_for(tmp_path, monkeypatch, form, field):
    store = make_store(tmp_path / "store", form=form)
    part = store.part("rounds/0/labels/t")
    whole = zarr.open_array(store=store.url, path=f"{part.path}/{field}", mode="r")[:]
    for unit in range(store.num_units):
        expected = whole[store.unit_rows(unit)]
        assert np.array_equal(store.read(part, field, unit), expected)
        for crops in ([9], [7, 0, 3, 3], range(CROPS)[::-1]):
            assert np.array_equal(store.read(part, field, unit, crops), expected[:, list(crops)])
    read = []
    plain = Store.read_checked
    monkeypatch.setattr(
        Store, "read_checked", lambda s, key, *a: (read.append(key), plain(s, key, *a))[1]
    )
    store.read(part, field, 0, [9, 0, 1])
    groups = [0, 9 // GROUP] if form == "full" else [0]
    assert read == [f"{part.path}/{field}/c/0/{group}/0" for group in groups]


def test_threads_read_the_same_shard_side_by_side(tmp_path):
    store = make_store(tmp_path / "store", form="full")
    part = store.part("rounds/0/labels/t")
    expected = store.read(part, "log_prob", 1)
    with ThreadPoolExecutor(8) as pool:
        for values in pool.map(lambda _: store.read(part, "log_prob", 1, [5, 6]), range(64)):
            assert np.array_equal(values, expected[:, [5, 6]])


def test_what_is_missing_or_damaged_is_not_served(tmp_path):
    store = make_store(tmp_path / "store", seal=False)
    part = store.part("rounds/0/labels/t")
    with pytest.raises(UnsealedStoreError, match="unit 2"):
        store.read(part, "ids", 2)
    with pytest.raises(KeyError):
        store.read(part, "log_prob", 0)
    with pytest.raises(DamagedStoreError, match="not in any commit record"):
        store.read(part, "ids", 0, files={})
    flip_bit(tmp_path / "store" / part.path / "ids/c/1/0/0")
    assert store.read(part, "ids", 0).shape[1] == CROPS
    with pytest.raises(DamagedStoreError, match="differs from what was committed"):
        store.read(part, "ids", 1)
