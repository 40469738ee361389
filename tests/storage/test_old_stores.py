"""Stores are kept promises: those that format 1 began with are read by every later version.

They lie under `tests/data/store-v1`, made by the code of commit 474340d (`make.py` there), beside
what plain Zarr read of them that day and the crops that were derived.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pipeline import losses, prepare_run, train_settings

from fkdpipe.inspect import report
from fkdpipe.labelgen import existing
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks import features as bases
from fkdpipe.pixels.crops import Jitter
from fkdpipe.storage import features, labels, reader, schema, settings, verify, writer
from fkdpipe.storage.location import open_location
from fkdpipe.storage.store import open_store
from fkdpipe.train import loop

PLACE = Path(__file__).parents[1] / "data" / "store-v1"
NAMES = ("stored", "derived", "imported")
CLASSES = ("ash", "beech", "cedar", "date palm", "fir", "élm")

# Worked out from the stored bytes by the formulas of docs/format.md.
COMPACT = np.array(
    [
        [0.9986346, 0.0005697, 0.0007387],
        [0.9954156, 0.0013987, 0.0031375],
        [0.8776914, 0.0828941, 0.0379946],
        [0.9993930, 0.0005709, 0.0000157],
    ]
)
COMPONENTS = np.array([-3.4418366, 3.5244372, -0.0944125, -1.4751950])
IDS = [[1, 3]]
PROB = np.array([[0.9409180, 0.0538940, 0.0051880]])


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def store(name):
    return open_store(PLACE / name)


@pytest.fixture
def recorded(name) -> dict[str, np.ndarray]:
    return dict(np.load(PLACE / f"{name}.npz"))


def test_it_is_whole(store, tmp_path):
    assert verify.verify(store, full=True) == []
    assert store.images.class_names == CLASSES
    assert (len(store.images), store.unit_size, store.num_units) == (12, 8, 2)


def test_its_settings_are_read_and_written_as_they_are(store):
    """Markers carry the digest of the settings, so not a key of them may change."""
    kinds = set()
    for part in store.parts.values():
        group = json.loads(Path(store.url, part.path, "zarr.json").read_text())
        facts = group["attributes"]["fkdpipe"]["settings"]
        assert part.settings.to_json() == facts
        assert part.settings_digest == schema.digest(facts)
        assert all(marker is not None for _, marker in store.markers(part))
        kinds.add(part.kind)
    assert {"images", "crops", "labels"} <= kinds


def test_its_values_are_those_that_were_written(store, recorded):
    seen = {f"images/{name}" for name in ("rejected_key", "rejected_reason", "rejected_detail")}
    columns = {"key": store.images.keys.astype(str), "class": store.images.class_N}
    columns |= {"size": store.images.size_N2, "bytes": store.images.bytes_N}
    columns["class_name"] = np.array(store.images.class_names)
    for field, values in columns.items():
        assert np.array_equal(values, recorded[f"images/{field}"])
        seen.add(f"images/{field}")
    for part in store.parts.values():
        for field in part.fields if part.kind != "images" else ():
            path = f"{part.path}/{field.name}"
            units = [store.read(part, field.name, unit) for unit in range(store.num_units)]
            assert np.array_equal(np.concatenate(units), recorded[path])
            assert units[0].dtype == recorded[path].dtype == field.dtype
            seen.add(path)
    if store.rounds()[0].settings.derived:
        seen |= {f"rounds/0/crops/{field}" for field in ("box", "flip", "jitter")}
    assert seen == set(recorded)


def test_its_crops_are_those_that_were_drawn(store, recorded, tmp_path):
    found = reader.finished(store, [])
    boxes = reader.CropReader(store, found.crops, tmp_path)
    rows, crops_M = np.arange(12), np.arange(found.crops_per_image)
    drawn = boxes.take(rows, crops_M)
    box, flip = drawn.box_NM4, drawn.flip_NM

    def expected(field):
        parts = [recorded[f"{part.path}/{field}"] for part in store.rounds()]
        return np.concatenate(parts, axis=1)

    assert np.array_equal(box, expected("box"))
    assert np.array_equal(flip, expected("flip"))
    assert (drawn.jitter_NM4 is not None) is ("rounds/0/crops/jitter" in recorded)
    if drawn.jitter_NM4 is not None:
        assert np.array_equal(drawn.jitter_NM4, expected("jitter"))


def test_what_is_in_them_is_known():
    stored, derived, imported = (open_store(PLACE / name) for name in NAMES)
    assert [part.settings.crops for part in stored.rounds()] == [5, 2]
    assert stored.sources() == ["full", "sparse"]
    sparse = stored.part("rounds/1/labels/sparse").settings
    assert (sparse.form, sparse.classes) == (labels.Form("topk", 5), 6)
    assert (sparse.temperature, sparse.precision, sparse.replay) == (1.0, "float32", "cpu")
    assert [teacher["name"] for teacher in sparse.teachers] == ["test_convnext"]
    post = stored.part("rounds/0/features/sparse/post").settings
    assert (post.layer, post.dims, post.code, post.basis) == ("post", 64, "float16", None)
    drawn = derived.rounds()[0].settings
    assert (drawn.derived, drawn.seed, drawn.scale) == (True, 7, (0.2, 1.0))
    assert drawn.jitter == Jitter(brightness=0.4, hue=0.1)
    assert str(derived.part("rounds/0/labels/compact").settings.form) == "topk:3:compact"
    pre = derived.part("rounds/0/features/logits/pre").settings
    assert (pre.layer, pre.dims, pre.width, pre.code) == ("pre", 4, 64, "int8")
    assert pre.basis == bases.load_basis(PLACE / "basis.safetensors").digest
    labelled = imported.part("rounds/0/labels/fkd").settings
    assert (labelled.temperature, labelled.replay) == (None, None)
    assert labelled.imported_from["format"] == "fkd"
    crops = imported.rounds()[0].settings
    assert (crops.imported, crops.scale, crops.seed) == (True, None, None)
    assert crops.others["labels"] == labelled.imported_from


def test_labels_and_features_mean_what_they_meant(tmp_path):
    """First image of each store, by numbers written down here."""
    derived = open_store(PLACE / "derived")
    part = derived.part("rounds/0/labels/compact")
    prob = labels.decode_probabilities(part.settings.form, derived.read(part, "stick", 0)[0])
    assert prob == pytest.approx(COMPACT, abs=1e-6)
    part = derived.part("rounds/0/features/logits/pre")
    kept = {field.name: derived.read(part, field.name, 1, [3])[2, 0] for field in part.fields}
    assert features.decode(part.settings.code, kept) == pytest.approx(COMPONENTS, abs=1e-6)
    stored = open_store(PLACE / "stored")
    found = reader.finished(stored, [("labels", "sparse", "")])
    sparse = reader.SparseReader(stored, found.labels[0], tmp_path)
    made = sparse.take(np.array([0]), np.array([6]), labels.Target("marginal-smoothing", 2))
    assert made.ids_BK.tolist() == IDS
    assert np.c_[made.prob_BK, made.rest_B] == pytest.approx(PROB, abs=1e-6)


def test_it_is_reported(name, store):
    measured = report.measure(store, bounds=True)
    crops, forms = {
        "stored": (7, ["", "full", "topk:5"]),
        "derived": (4, ["", "hard", "logits", "topk:3:compact"]),
        "imported": (2, ["topk:2"]),
    }[name]
    assert (measured.images, measured.crops_per_image, measured.classes) == (12, crops, 6)
    assert measured.finished
    assert sorted(source.form for source in measured.sources) == forms


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("stored", "sparse", "marginal-smoothing:5"),
        ("stored", "full", "full"),
        ("derived", "compact", "marginal-renorm:2"),
        ("derived", "logits", "full"),
        ("derived", "hard", "hard"),
        ("imported", "fkd", "marginal-smoothing:2"),
    ],
)
def test_a_student_trains_on_it(name, source, target, tmp_path):
    wanted = train_settings(
        target=target, source=source, epochs=1, batch_size=8, crops_per_image=1, replay="cpu"
    )
    run = prepare_run(tmp_path / "run", PLACE / "images", open_store(PLACE / name), wanted)
    result = loop.train(run)
    assert result.steps == 2
    assert np.isfinite(losses(tmp_path / "run")).all()


def test_it_can_be_grown_and_thinned_as_one_of_today(tmp_path):
    place = tmp_path / "store"
    shutil.copytree(PLACE / "derived", place)
    store = open_store(place)
    drawn = existing.drawing(store, GenerateSettings(teacher=("t",)))
    for part in store.rounds():
        existing.check_drawing(store, part, drawn)
    added = writer.add_crops(store, drawn.distribution, seed=7, count=2, derived=True)
    assert (added.settings.first, added.path) == (4, "rounds/1/crops")
    begun = store.part("rounds/0/labels/hard")
    assert writer.add_part(store, begun.path, begun.settings, begun.fields) == begun
    assert settings.parse("labels", begun.settings.to_json()) == begun.settings
    assert open_location(place).length("commits/rounds/1/crops/part.json")
