"""Label analysis: every number against plain loops and closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import oracles
import pytest
import torch
from pipeline import CPU, make_store
from random_store import CROPS, IMAGES
from random_store import make_store as make_random_store

from fkdpipe.common.errors import ModelError, StoreError, UnsealedStoreError
from fkdpipe.inspect import analysis, measures, models, sources
from fkdpipe.networks import teachers
from fkdpipe.networks.models import ModelSpec
from fkdpipe.pixels.replay import View, open_replay
from fkdpipe.storage import labels
from fkdpipe.storage.store import open_store

FORMS = ["topk:3", "hard", "full"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, folder, teacher):
    """One store of real pictures with a source for each form, named after it."""
    place = tmp_path_factory.mktemp("inspect") / "store"
    for form in FORMS:
        make_store(place, folder, [teacher], form=form, source=form.replace(":", "-"), crops=4)
    return open_store(place)


def opened_of(store, tmp_path, *names, **options):
    return sources.open_labels(store, names, tmp_path / "cache", **options)


def dense(opened, place=0):
    """Every crop's label, in order of image and crop."""
    crops_M = np.arange(opened.finished.crops_per_image)
    made = [
        np.stack([opened.labels[place].take(np.array([row]), crops_M)[0]])
        for row in opened.finished.rows
    ]
    return np.concatenate(made)


def run(opened, **options):
    crops_M = np.arange(opened.finished.crops_per_image)
    return analysis.analyse(opened, opened.finished.rows, crops_M, **options)


def test_closed_forms_of_the_measures():
    uniform, sharp = np.full((1, 8), 1 / 8), np.eye(8)[:1]
    assert measures.entropy(uniform)[0] == pytest.approx(math.log(8))
    assert measures.entropy(sharp)[0] == 0
    assert measures.total_variation(uniform, uniform)[0] == 0
    assert measures.total_variation(sharp, np.eye(8)[1:2])[0] == 1
    assert measures.divergence(uniform, uniform)[0] == pytest.approx(0)
    assert measures.divergence(sharp, uniform)[0] == pytest.approx(math.log(8))
    assert measures.divergence(uniform, sharp)[0] == math.inf
    assert measures.cross_entropy(sharp, measures.log_guess(uniform))[0] == pytest.approx(
        math.log(8), rel=1e-6
    )
    nothing = measures.cross_entropy(np.eye(8)[1:2], measures.log_guess(sharp))[0]
    assert nothing == pytest.approx(22 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("form", ["topk:5", "topk:5:compact", "hard", "full", "logits"])
def test_labels_of_every_form_are_distributions(tmp_path, form):
    opened = opened_of(make_random_store(tmp_path / "store", form=form), tmp_path)
    made = dense(opened)
    assert made.shape == (IMAGES, CROPS, 40)
    assert np.allclose(made.sum(axis=-1), 1, atol=1e-5)
    assert opened.labels[0].exact is (form in ("full", "logits"))
    if form == "hard":
        assert set(np.unique(made)) == {0, 1}


def test_blocks_are_every_crop_once_within_a_unit_and_a_group(tmp_path, monkeypatch):
    opened = opened_of(make_random_store(tmp_path / "store", form="full"), tmp_path)
    monkeypatch.setattr(sources, "BLOCK_VALUES", 40 * 4 * 9)
    seen = np.zeros((IMAGES, CROPS), dtype=int)
    rows_N, crops_M = np.arange(3, IMAGES), np.array([0, 1, 4, 9])
    for rows_I, crops_m in sources.blocks(opened, rows_N, crops_M):
        assert len(set(rows_I // 64)) == len(set(crops_m // 4)) == 1
        assert len(rows_I) * len(crops_m) <= 4 * 9
        seen[np.ix_(rows_I, crops_m)] += 1
    assert (seen[np.ix_(rows_N, crops_M)] == 1).all()
    assert seen.sum() == len(rows_N) * len(crops_M)


@pytest.mark.parametrize("form", FORMS)
def test_a_sources_numbers_are_those_of_plain_loops(stores, form, tmp_path):
    opened = opened_of(stores, tmp_path, form.replace(":", "-"))
    found = run(opened).sources[0]
    crops = dense(opened).astype(np.float64).reshape(-1, 5)
    truth = np.repeat(opened.truth_N[opened.finished.rows], 4)
    entropies = [-sum(p * math.log(p) for p in crop if p > 0) for crop in crops]
    assert found.entropy == pytest.approx(np.mean(entropies), abs=1e-6)
    assert found.top1 == pytest.approx(np.mean([max(crop) for crop in crops]), abs=1e-6)
    agrees = [int(np.argmax(crop)) == t for crop, t in zip(crops, truth, strict=True)]
    assert found.agreement == pytest.approx(np.mean(agrees))
    pairs = list(zip(crops, truth, agrees, strict=True))
    assert found.unsure == np.mean([max(crop) < 0.5 for crop in crops])
    assert found.elsewhere == np.mean([max(crop) >= 0.5 and not agree for crop, _, agree in pairs])
    assert found.background == np.mean([max(crop) < 0.5 and crop[t] < 0.1 for crop, t, _ in pairs])
    assert sum(found.entropy_histogram) == sum(found.top1_histogram) == len(crops)
    for k, (mean, low) in found.kept.items():
        masses = sorted(sum(sorted(crop)[-k:]) for crop in crops)
        assert mean == pytest.approx(np.mean(masses), abs=1e-5)
        assert low == pytest.approx(masses[math.ceil(0.1 * len(masses)) - 1], abs=2e-3)
    assert list(found.kept) == {"hard": [1], "topk:3": [1, 2, 3], "full": [1, 2, 3, 5]}[form]
    assert sum(band.crops for band in found.by_confidence) == len(crops)
    assert sum(band.crops for band in found.by_area) == len(crops)


def test_reliability_bands_are_those_of_plain_loops(stores, tmp_path):
    opened = opened_of(stores, tmp_path, "full")
    found = run(opened).sources[0]
    crops = dense(opened).reshape(-1, 5)
    truth = np.repeat(opened.truth_N[opened.finished.rows], 4)
    gap = 0.0
    for band in found.by_confidence:
        inside = [
            (max(crop), int(np.argmax(crop)) == t)
            for crop, t in zip(crops, truth, strict=True)
            if band.low <= max(crop) < band.high or max(crop) == band.high == 1.0
        ]
        assert band.crops == len(inside)
        if inside:
            assert band.confidence == pytest.approx(np.mean([p for p, _ in inside]))
            assert band.agreement == pytest.approx(np.mean([a for _, a in inside]))
            gap += len(inside) * abs(band.confidence - band.agreement)
    assert found.calibration_error == pytest.approx(gap / len(crops))


def test_what_a_target_does_is_measured_against_equations_written_out(stores, tmp_path):
    opened = opened_of(stores, tmp_path, "full")
    found = run(opened).sources[0]
    crops = dense(opened).astype(np.float64).reshape(-1, 5)
    assert list(found.changes) == ["hard", "smoothing"]  # K = 5 is everything with five classes
    for name, change in found.changes.items():
        made = [oracles.dense_target(name, 1, crop) for crop in crops]
        distances = [0.5 * np.abs(a - b).sum() for a, b in zip(crops, made, strict=True)]
        assert change.total_variation == pytest.approx(np.mean(distances), abs=1e-5)
    assert found.changes["hard"].divergence == math.inf
    smoothed = [oracles.dense_target("smoothing", 1, crop) for crop in crops]
    expected = [
        sum(p * math.log(p / q) for p, q in zip(a, b, strict=True) if p >= measures.FLOOR)
        for a, b in zip(crops, smoothed, strict=True)
    ]
    assert found.changes["smoothing"].divergence == pytest.approx(np.mean(expected), rel=1e-3)


def test_only_an_exact_label_is_a_reference_for_targets(stores, tmp_path):
    assert run(opened_of(stores, tmp_path, "topk-3")).sources[0].changes == {}


def test_distances_are_cross_entropies_by_class(stores, tmp_path):
    opened = opened_of(stores, tmp_path, "full", "topk-3")
    found = run(opened)
    assert found.kinds == ("one-hot", "hard", "full", "topk-3")
    truth = np.repeat(opened.truth_N[opened.finished.rows], 4)
    kinds = {
        "one-hot": np.eye(5)[truth],
        "full": dense(opened).reshape(-1, 5),
        "topk-3": dense(opened, 1).reshape(-1, 5),
    }
    kinds["hard"] = np.eye(5)[kinds["full"].argmax(1)]
    for a, guess in enumerate(found.kinds):
        for b, target in enumerate(found.kinds):
            if guess in ("one-hot", "hard"):
                assert math.isnan(found.distance_AA[a, b])
                continue
            each = np.array(
                [
                    -sum(
                        p * math.log(max(q, measures.FLOOR))
                        for p, q in zip(x, y, strict=True)
                        if p > 0
                    )
                    for x, y in zip(kinds[target], kinds[guess], strict=True)
                ]
            )
            assert found.distance_AA[a, b] == pytest.approx(each.mean(), rel=1e-4)
            for c in range(5):
                mean = each[truth == c].mean()
                assert found.distance_CAA[c, a, b] == pytest.approx(mean, rel=1e-4)
    plain = found.to_json()["distances"]
    assert plain["classes"]["cedar"][2][3] == pytest.approx(found.distance_CAA[2, 2, 3])
    # Gibbs: no guess is nearer to a label than the label itself.
    assert found.distance_AA[2, 2] <= found.distance_AA[3, 2]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("full", {"smoothing": 1, "MS:4": 4, "MR:4": 4}),
        ("topk-3", {"smoothing": 1, "MR:3": 3}),
        ("hard", {}),
    ],
)
def test_a_single_source_is_compared_with_the_labels_it_serves(stores, tmp_path, name, kinds):
    found = run(opened := opened_of(stores, tmp_path, name))
    assert found.kinds == ("one-hot", "hard", name, *kinds)
    crops = dense(opened).reshape(-1, 5)
    words = {"sm": "smoothing", "MS": "marginal-smoothing", "MR": "marginal-renorm"}
    for place, (kind, k) in enumerate(kinds.items(), 3):
        made = np.stack([oracles.dense_target(words[kind[:2]], k, crop) for crop in crops])
        back = np.maximum(made, measures.FLOOR)
        to_label = -np.sum(crops * np.log(back), axis=1).mean()
        from_label = -np.sum(made * np.log(np.maximum(crops, measures.FLOOR)), axis=1).mean()
        assert found.distance_AA[place, 2] == pytest.approx(to_label, rel=1e-3)
        assert found.distance_AA[2, place] == pytest.approx(from_label, rel=1e-3)


def test_classes_are_those_of_the_images(stores, tmp_path):
    opened = opened_of(stores, tmp_path, "full")
    found = run(opened)
    crops, truth = dense(opened), opened.truth_N[opened.finished.rows]
    assert [c.name for c in found.classes] == list(stores.images.class_names)
    for number, each in enumerate(found.classes):
        own = crops[truth == number].reshape(-1, 5)
        assert each.crops == len(own)
        assert each.agreement == pytest.approx(np.mean(own.argmax(1) == number))
        assert each.entropy == pytest.approx(measures.entropy(own).mean())


def test_without_a_class_for_every_label_there_is_no_ground_truth(tmp_path):
    opened = opened_of(make_random_store(tmp_path / "store"), tmp_path)  # 40 outputs, 7 folders
    assert opened.class_names[39] == "39"
    found = run(opened)
    assert math.isnan(found.sources[0].agreement)
    assert math.isnan(found.distance_AA[2, 0])
    assert found.distance_AA[2, 1] > 0
    assert found.classes == ()
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["sources"]["t"]["agreement"] is None


def test_a_models_predictions_are_of_the_same_crops(stores, tmp_path, folder, checkpoint):
    """The teacher itself, run again, is as far from its labels as they are from themselves."""
    opened = opened_of(stores, tmp_path, "full")
    (model,) = teachers.load_teachers(
        [ModelSpec("test_resnet", "timm", checkpoint)],
        class_names=stores.images.class_names,
        device=torch.device(CPU),
    )
    with open_replay("cpu", [View.of(model.preprocessing)], threads=1) as replayer:
        predict = models.predictor(opened, folder / "train", model, replayer, batch=16)
        rows, crops_m = opened.finished.rows[:11], np.array([2, 3])
        made = predict(rows, crops_m)
        found = analysis.analyse(opened, rows, crops_m, models=[("again", predict)])
    assert np.abs(made - opened.labels[0].take(rows, crops_m)).max() < 2e-3
    assert found.kinds[3] == "again"
    assert found.distance_AA[3, 2] == pytest.approx(found.distance_AA[2, 2], abs=1e-3)


def test_a_model_of_other_classes_is_refused(stores, tmp_path, folder, teacher):
    opened = opened_of(make_random_store(tmp_path / "store"), tmp_path)
    refused = pytest.raises(ModelError, match="5 outputs, but the labels have 40 classes")
    with open_replay("cpu", [View.of(teacher.preprocessing)], threads=1) as replayer, refused:
        models.predictor(opened, folder / "train", teacher, replayer)


def test_scores_of_a_projection_head_have_no_ground_truth(stores, tmp_path, monkeypatch):
    assert (opened_of(stores, tmp_path, "full").truth_N >= 0).all()
    monkeypatch.setattr(sources, "SELF_SUPERVISED", ("timm",))
    opened = opened_of(stores, tmp_path, "full")
    assert (opened.truth_N == -1).all()
    assert opened.class_names == ("0", "1", "2", "3", "4")


def test_unsealed_stores_are_looked_at_only_when_asked(tmp_path):
    store = make_random_store(tmp_path / "store", seal=False)
    with pytest.raises(UnsealedStoreError):
        opened_of(store, tmp_path)
    opened = opened_of(store, tmp_path, allow_partial=True)
    assert run(opened).images == 128
    assert labels.parse_form("topk:5") == opened.labels[0].form


def test_a_source_must_be_chosen_among_those_there_are(stores, tmp_path):
    with pytest.raises(StoreError, match="choose one with --source"):
        opened_of(stores, tmp_path)
    with pytest.raises(StoreError, match="it has full, hard"):
        opened_of(stores, tmp_path, "other")
    opened = opened_of(stores, tmp_path, "full")
    assert len(sources.sample_rows(opened, 7)) == 7
    assert len(sources.sample_rows(opened, 0)) == 51
