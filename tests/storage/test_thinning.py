"""A store shrinks into another one, which is what a poorer generation would have made."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import CLASSES
from pipeline import arrays_of, make_store, stamps, unchanged

from fkdpipe.common.errors import StoreMismatchError, UsageError
from fkdpipe.storage import labels, reader, thin, verify
from fkdpipe.storage.labels import Target
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.thin import Subset

THINNINGS = [
    ("logits", "full"),
    ("logits", "topk:4"),
    ("full", "topk:3"),
    ("full", "topk:3:compact"),
    ("full", "hard"),
    ("topk:4", "topk:2"),
    ("topk:4", "topk:4:compact"),
    ("topk:5", "topk:5:compact"),
    ("topk:3:compact", "hard"),
    ("topk:3", "topk:3"),
]


@pytest.mark.parametrize(("form", "poorer"), THINNINGS)
def test_thinning_gives_what_the_poorer_store_would_hold(tmp_path, folder, teacher, form, poorer):
    store = make_store(tmp_path / "rich", folder, [teacher], form=form, crops=6)
    wanted = Subset(crops=4, form=labels.parse_form(poorer))
    small = thin.thin(store, LocalLocation(tmp_path / "thin"), wanted)
    assert not verify.verify(small, full=True)
    direct = make_store(tmp_path / "direct", folder, [teacher], form=poorer, crops=4)
    a, b = arrays_of(small), arrays_of(direct)
    assert a.keys() == b.keys()
    for name in ("rounds/0/crops/box", "rounds/0/crops/flip", "images/key"):
        assert np.array_equal(a[name], b[name])
    bounds = [labels.error_bound(labels.parse_form(f), len(CLASSES)) for f in (form, poorer)]
    difference = 0.5 * np.abs(dense(small, tmp_path) - dense(direct, tmp_path)).sum(-1)
    tied = labels.parse_form(form).compact and labels.parse_form(poorer).k < 3
    assert np.quantile(difference, 0.95 if tied else 1.0) <= sum(bounds) + 2e-3


def dense(store, tmp_path) -> np.ndarray:
    found = reader.finished(store, [("labels", "t", "")])
    form = reader.label_form(found.labels[0])
    rows, crops = np.arange(store.num_images), np.arange(4)
    if form.sparse:
        sparse = reader.SparseReader(store, found.labels[0], tmp_path / "cache")
        target = Target("hard") if form.kind == "hard" else Target("marginal-smoothing", form.k)
        return labels.to_dense(sparse.take(rows, crops, target), len(CLASSES))
    wide = reader.WideReader(store, found.labels[0], "log_prob")
    return labels.softmax(wide.unit(0, crops).reshape(-1, len(CLASSES)))


def test_thinning_across_rounds_derives_boxes_and_goes_on_after_a_stop(tmp_path, folder, teacher):
    make_store(tmp_path / "rich", folder, [teacher], crops=3)
    store = make_store(tmp_path / "rich", folder, [teacher], crops=6)
    wanted = Subset(crops=5, derived_boxes=True)
    small = thin.thin(store, LocalLocation(tmp_path / "thin"), wanted)
    assert small.rounds()[0].settings.derived
    before = stamps(small)
    small.location.delete("commits/rounds/0/labels/t/manifest.json")
    again = thin.thin(store, LocalLocation(tmp_path / "thin"), wanted)
    kept = {k: v for k, v in before.items() if k.startswith("rounds") and "/c/" in k}
    assert unchanged(kept, again)
    for one, both in ((store, again), (again, store)):
        found = reader.finished(one, [("labels", "t", "")])
        boxes = reader.CropReader(one, found.crops, tmp_path / "c").take(np.arange(9), np.arange(5))
        other = reader.finished(both, [("labels", "t", "")])
        theirs = reader.CropReader(both, other.crops, tmp_path / "c")
        assert np.array_equal(boxes.box_NM4, theirs.take(np.arange(9), np.arange(5)).box_NM4)


def test_thinning_cannot_make_a_richer_store(tmp_path, folder, teacher):
    store = make_store(tmp_path / "store", folder, [teacher], form="topk:3:compact")
    place = LocalLocation(tmp_path / "thin")
    for form in ("full", "topk:4:compact", "topk:3"):
        with pytest.raises(StoreMismatchError, match="cannot be reduced to"):
            thin.thin(store, place, Subset(form=labels.parse_form(form)))
    with pytest.raises(UsageError, match="has 4 crops per image"):
        thin.thin(store, place, Subset(crops=9))
    assert not (tmp_path / "thin").exists()


def test_a_store_is_not_thinned_onto_another_or_to_itself(tmp_path, folder, teacher):
    store = make_store(tmp_path / "store", folder, [teacher])
    before = stamps(store)
    small = Subset(crops=2)
    with pytest.raises(UsageError, match="is the store itself"):
        thin.thin(store, store.location, small)
    with pytest.raises(UsageError, match=r"everything in .* Choose what to reduce: --crops"):
        thin.thin(store, LocalLocation(tmp_path / "same"), Subset())
    assert not (tmp_path / "same").exists()
    thin.thin(store, LocalLocation(tmp_path / "thin"), small)
    with pytest.raises(StoreMismatchError, match="Choose a new folder") as raised:
        thin.thin(store, LocalLocation(tmp_path / "thin"), Subset(crops=3))
    assert "--source" not in str(raised.value)
    assert unchanged(before, store)
