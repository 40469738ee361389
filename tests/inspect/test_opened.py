"""A store opened by hand: names, values and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import random_store

from fkdpipe.common.errors import StoreError, UnsealedStoreError, UsageError
from fkdpipe.inspect import report
from fkdpipe.inspect.opened import open_store
from fkdpipe.storage import features, labels, writer

PLACE = Path(__file__).parents[1] / "data" / "store-v1"


@pytest.fixture(scope="module")
def stored():
    return open_store(PLACE / "stored")


@pytest.fixture(scope="module")
def derived():
    return open_store(PLACE / "derived")


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, np.ndarray]]:
    """By store, what plain Zarr reads of it."""
    return {name: dict(np.load(PLACE / f"{name}.npz")) for name in ("stored", "derived")}


def joined(values, path: str, field: str) -> np.ndarray:
    """A field over both rounds of `stored`."""
    return np.concatenate([values[f"rounds/{r}/{path}/{field}"] for r in (0, 1)], axis=1)


def test_what_it_holds(stored, derived):
    assert (stored.images, stored.crops_per_image, len(stored.classes)) == (12, 7, 6)
    assert stored.forms == {"full": "full", "sparse": "topk:5"}
    post = next(source for source in stored.sources if source.kind == "features")
    assert (post.name, post.form, post.targets) == ("sparse/post", "", ())
    assert (post.units_done, post.units) == (4, 4)
    sparse = next(source for source in stored.sources if source.name == "sparse")
    assert sparse.teachers == ("test_convnext",)
    assert "marginal-smoothing (K<=5)" in sparse.targets
    assert derived.forms == {"compact": "topk:3:compact", "hard": "hard", "logits": "logits"}


def test_keys_and_classes_are_in_the_stores_order(stored, recorded):
    keys = recorded["stored"]["images/key"].tolist()
    assert stored.keys() == keys
    assert stored.keys([3, -1]) == [keys[3], keys[-1]]
    assert stored.keys(slice(2, 4)) == keys[2:4]
    assert stored.keys(5) == [keys[5]]
    names = [stored.classes[c] for c in stored.class_indices]
    assert names == [key.split("/")[0] for key in keys]


@pytest.mark.parametrize(
    ("source", "field", "path"),
    [
        ("sparse", "ids", "labels/sparse"),
        ("sparse", "prob", "labels/sparse"),
        ("full", "log_prob", "labels/full"),
        ("sparse/post", "value", "features/sparse/post"),
        (None, "box", "crops"),
        ("full", "flip", "crops"),
    ],
)
def test_values_are_those_on_disk(stored, recorded, source, field, path):
    expected = joined(recorded["stored"], path, field)
    everything = stored.read(source, field)
    assert np.array_equal(everything, expected)
    assert everything.dtype == expected.dtype
    rows, crops = [11, 0, 8, 8], [6, 4, 0]  # over both units, rounds and a crop group's end
    some = stored.read(source, field, rows, crops)
    assert np.array_equal(some, expected[rows][:, crops])
    assert stored.read(source, field, [], 3).shape == (0, 1, *expected.shape[2:])
    assert stored.read(source, field, 3, []).shape == (1, 0, *expected.shape[2:])


@pytest.mark.parametrize("field", ["box", "flip", "jitter"])
def test_derived_crops_are_drawn_again(derived, recorded, field):
    expected = recorded["derived"][f"rounds/0/crops/{field}"]
    assert np.array_equal(derived.read(None, field), expected)
    assert np.array_equal(derived.read("hard", field, [9, 1], [2]), expected[[9, 1]][:, [2]])


def test_probabilities_are_dense(stored, derived, recorded):
    prob = stored.probabilities("sparse")
    assert prob.shape == (12, 7, 6)
    assert prob.dtype == np.float32
    assert prob.sum(-1) == pytest.approx(np.ones((12, 7)), abs=1e-6)
    ids, kept = (stored.read("sparse", name).astype(np.float64) for name in ("ids", "prob"))
    left = np.setdiff1d(np.arange(6), ids[4, 5])
    assert prob[4, 5, ids[4, 5].astype(int)] == pytest.approx(kept[4, 5], abs=1e-6)
    assert prob[4, 5, left] == pytest.approx(1 - kept[4, 5].sum(), abs=1e-6)

    full = np.exp(joined(recorded["stored"], "labels/full", "log_prob").astype(np.float64))
    expected = full / full.sum(-1, keepdims=True)
    assert stored.probabilities("full", [3], [6, 0]) == pytest.approx(
        expected[[3]][:, [6, 0]], abs=1e-6
    )
    assert stored.probabilities("full", [3], [6], temperature=9.0) == pytest.approx(
        expected[[3]][:, [6]], abs=1e-6
    )
    one_hot = np.eye(6)[recorded["derived"]["rounds/0/labels/hard/ids"][..., 0]]
    assert np.array_equal(derived.probabilities("hard"), one_hot)
    z = recorded["derived"]["rounds/0/labels/logits/logit"][5, 2].astype(np.float64) / 3
    assert derived.probabilities("logits", 5, 2, temperature=3.0)[0, 0] == pytest.approx(
        np.exp(z) / np.exp(z).sum(), abs=1e-6
    )


def test_features_are_decoded(stored, derived, recorded):
    value = joined(recorded["stored"], "features/sparse/post", "value")
    assert np.array_equal(stored.features("sparse/post", [7]), value[[7]].astype(np.float32))
    path = "rounds/0/features/logits/pre"
    code, scale = (recorded["derived"][f"{path}/{name}"][2] for name in ("code", "scale"))
    assert np.array_equal(
        derived.features("logits/pre", 2)[0],
        features.decode("int8", {"code": code, "scale": scale}),
    )


def test_what_is_not_there_is_named(stored):
    with pytest.raises(StoreError, match="no source 'other'; it has sparse/post, full, sparse"):
        stored.read("other", "ids")
    with pytest.raises(StoreError, match="no field 'ids' of its crops; it has box, flip"):
        stored.read(None, "ids")
    with pytest.raises(StoreError, match="no field 'prob' of full; it has box, flip, log_prob"):
        stored.read("full", "prob")
    with pytest.raises(StoreError, match="sparse has no features"):
        stored.features("sparse")
    with pytest.raises(StoreError, match="sparse/post has no labels"):
        stored.probabilities("sparse/post")
    with pytest.raises(UsageError, match="has 12 images; index 12 is out of bounds"):
        stored.keys([12])
    with pytest.raises(UsageError, match="has 7 of each image; index 7 is out of bounds"):
        stored.read("full", "log_prob", 0, 7)


def test_a_store_in_the_making_is_read_as_far_as_it_is(tmp_path):
    made = random_store.make_store(tmp_path / "store", seal=False)
    store = open_store(tmp_path / "store")
    done = range(2 * random_store.UNIT)
    assert store.sources[0].units_done == 2
    prob = store.probabilities("t", done)
    assert prob.shape == (len(done), random_store.CROPS, random_store.CLASSES)
    assert labels.parse_form(store.forms["t"]) == made.part("rounds/0/labels/t").settings.form
    for field in ("ids", "box"):
        with pytest.raises(UnsealedStoreError, match="unit 2"):
            store.read("t", field, [0, 149])


@pytest.mark.parametrize("form", ["topk:5", "topk:5:compact", "hard", "full"])
def test_images_that_failed_have_no_probabilities(tmp_path, form):
    made = random_store.make_store(tmp_path / "store", form=form)
    part = made.part("rounds/0/labels/t")
    values = {field.name: made.read(part, field.name, 1).copy() for field in part.fields}
    for field in part.fields:
        values[field.name][3] = field.fill
    failed = {random_store.UNIT + 3: ("unreadable", "")}
    writer.commit_unit(made, part, 1, values, failed=failed)
    writer.seal(made, part)
    prob = open_store(tmp_path / "store").probabilities("t")
    assert np.isnan(prob[random_store.UNIT + 3]).all()
    assert np.isfinite(np.delete(prob, random_store.UNIT + 3, axis=0)).all()


def test_it_prints_as_a_short_table(stored, tmp_path):
    lines = repr(stored).splitlines()
    assert lines[0] == f"{PLACE / 'stored'}, 12 images x 7 crops, 6 classes"
    assert lines[1:] == [
        "  sparse/post, features, 4 of 4 units done",
        "  full, full, 4 of 4 units done",
        "  sparse, topk:5, 4 of 4 units done",
    ]
    html = stored._repr_html_()
    assert html.count("<tr>") == 4
    assert "<td>topk:5</td>" in html
    odd = tmp_path / "a<b"
    random_store.make_store(odd)
    assert "a&lt;b" in open_store(odd)._repr_html_()


def test_its_report_is_that_of_the_command(stored):
    assert stored.report() == report.measure(stored._store)


def test_opening_a_store_needs_no_torch():
    code = (
        "import sys; from fkdpipe.inspect.opened import open_store; "
        f"store = open_store({str(PLACE / 'derived')!r}); repr(store); store.read(None, 'box'); "
        "assert not {'torch', 'timm', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
