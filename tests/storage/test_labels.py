"""Forms and targets: FKD equations 3 to 7, quantisation within the stated bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense_target

from fkdpipe.common.errors import StoreMismatchError, UsageError
from fkdpipe.storage import labels
from fkdpipe.storage.labels import Form, Target
from fkdpipe.train.stored import from_scores, spread

CPU = torch.device("cpu")
TARGETS = [
    Target("full"),
    Target("hard"),
    Target("smoothing"),
    *(Target("marginal-smoothing", k) for k in (1, 3, 7)),
    *(Target("marginal-renorm", k) for k in (1, 3, 7)),
]


def distributions(rows: int, classes: int, seed: int, sharpness: float = 3.0) -> np.ndarray:
    z = np.random.default_rng(seed).normal(size=(rows, classes)) * sharpness
    e = np.exp(z - z.max(1, keepdims=True))
    return (e / e.sum(1, keepdims=True)).astype(np.float32)


def stored(form: Form, prob_BC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, decoded probabilities) as a reader gets them."""
    ids, prob = labels.hybrid_order(*labels.top_k(prob_BC, form.k))
    if form.kind == "hard":
        return ids, np.ones_like(prob)
    return ids, labels.decode_probabilities(form, labels.encode_probabilities(form, prob))


def served(form: Form, target: Target, prob_BC: np.ndarray) -> np.ndarray:
    classes = prob_BC.shape[1]
    if form.sparse:
        made = labels.sparse_target(target, *stored(form, prob_BC), classes)
        dense = labels.to_dense(made, classes)
        tensors = (torch.from_numpy(a) for a in (made.ids_BK, made.prob_BK, made.rest_B))
        on_device = spread(*tensors, classes)
        assert np.allclose(on_device.numpy(), dense, atol=1e-7)
        return dense
    with np.errstate(divide="ignore"):  # a probability of zero is -inf, and stored finite
        scores = labels.encode_scores(np.log(prob_BC))
    dense = labels.dense_target(target, labels.softmax(scores))
    on_device = from_scores(torch.from_numpy(scores), 1.0, target)
    assert np.allclose(on_device.numpy(), dense, atol=1e-6)
    return dense


def variation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 0.5 * np.abs(a.astype(np.float64) - b.astype(np.float64)).sum(-1)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("text", ["full", "topk:7", "topk:9", "hard"])
def test_every_target_equals_its_slow_twin(text, target):
    form, classes = labels.parse_form(text), 9
    prob = distributions(50, classes, 1)
    exact = np.stack([dense_target(target.kind, target.k, row.astype(np.float64)) for row in prob])
    try:
        labels.check_target(form, target, classes)
    except StoreMismatchError:
        assert text in ("hard", "topk:7", "topk:9")
        return
    made = served(form, target, prob)
    assert np.allclose(made.sum(1), 1, atol=1e-6)
    assert (made >= 0).all()
    assert variation(made, exact).max() <= 2 * labels.error_bound(form, classes) + 1e-6


def test_closed_forms():
    prob = np.array([[0.6, 0.1, 0.25, 0.05]], dtype=np.float32)
    form = labels.parse_form("topk:3")

    def target(text):
        return served(form, labels.parse_target(text), prob)[0]

    assert target("hard") == pytest.approx([1, 0, 0, 0])
    assert target("smoothing") == pytest.approx([0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3], abs=1e-3)
    assert target("marginal-smoothing:2") == pytest.approx([0.6, 0.075, 0.25, 0.075], abs=1e-3)
    assert target("marginal-renorm:2") == pytest.approx([0.6 / 0.85, 0, 0.25 / 0.85, 0], abs=1e-3)


@pytest.mark.parametrize("text", ["topk:1", "topk:5", "topk:5:compact", "topk:12:compact", "full"])
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 4.0, 40.0])
def test_quantisation_stays_within_the_stated_bound(text, sharpness):
    form, classes = labels.parse_form(text), 12
    prob = distributions(400, classes, 2, sharpness)
    target = Target("marginal-smoothing", form.k) if form.sparse else Target("full")
    if form.sparse:
        kept = labels.sparse_target(target, *labels.top_k(prob, form.k), classes)
        exact = labels.to_dense(kept, classes)
    else:
        exact = prob
    worst = variation(served(form, target, prob), exact).max()
    assert worst <= labels.error_bound(form, classes) + 2e-7
    if form.compact and sharpness == 1.0:
        assert worst > labels.error_bound(form, classes) / 50  # the bound is not idle


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.floats(-60, 60), min_size=2, max_size=20),
    k=st.integers(1, 20),
    compact=st.booleans(),
)
def test_properties_of_stored_labels(logits, k, compact):
    classes = len(logits)
    k = min(k, classes)
    prob = labels.softmax(np.array([logits], dtype=np.float32))
    form = Form("topk", k, compact=compact)
    ids, kept = stored(form, prob)
    assert np.isfinite(kept).all()
    assert (kept >= 0).all()
    assert kept.sum() <= 1 + 1e-6
    assert ids[0, 0] == prob[0].argmax()
    assert (np.diff(ids[0, 1:]) > 0).all()
    for target in (Target("marginal-smoothing", k), Target("marginal-renorm", k)):
        made = labels.to_dense(labels.sparse_target(target, ids, kept, classes), classes)
        assert made.sum() == pytest.approx(1, abs=1e-5)
        assert (made >= 0).all()
        inside = labels.sparse_target(target, ids, kept, classes)
        order = np.argsort(-prob[0][inside.ids_BK[0]], kind="stable")
        values = inside.prob_BK[0][order]
        slack = labels.error_bound(form, classes) * 2 / max(float(kept.sum()), 1e-6) + 1e-6
        assert (np.diff(values) <= slack).all()


def test_top_k_order_is_kept_exactly_in_float16():
    prob = distributions(300, 40, 3)
    ids, kept = stored(Form("topk", 10), prob)
    exact = np.take_along_axis(prob, ids, 1)
    rank = np.argsort(-exact, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(kept, rank, 1), axis=1) <= 0).all()


def test_k_equal_to_c_leaves_no_rest():
    prob = distributions(20, 6, 4)
    made = labels.sparse_target(Target("marginal-smoothing", 6), *stored(Form("topk", 6), prob), 6)
    assert (made.rest_B == 0).all()
    assert np.allclose(labels.to_dense(made, 6), prob, atol=1e-3)


def test_all_mass_on_classes_that_were_dropped():
    """StoredLayer probabilities that round to zero still give a distribution."""
    ids = np.array([[3, 1]])
    made = labels.sparse_target(Target("marginal-renorm", 2), ids, np.zeros((1, 2), np.float32), 9)
    assert made.prob_BK.tolist() == [[0.5, 0.5]]


def test_hard_reads_the_first_id_even_when_probabilities_tie():
    form = Form("topk", 3, compact=True)
    prob = np.array([[0.3333, 0.3334, 0.3333]], dtype=np.float32)
    ids, kept = stored(form, prob)
    assert labels.sparse_target(Target("hard"), ids, kept, 3).ids_BK.tolist() == [[1]]
    assert labels.sparse_target(Target("smoothing"), ids, kept, 3).ids_BK.tolist() == [[1]]


def test_a_poorer_k_in_the_compact_code_swaps_only_classes_that_nearly_tie():
    """What docs/format.md states: exact probabilities of swapped classes differ by 2 bounds."""
    form, classes = Form("topk", 10, compact=True), 50
    prob = distributions(2000, classes, 5, 1.5)
    made = labels.sparse_target(Target("marginal-smoothing", 5), *stored(form, prob), classes)
    fifth = np.sort(prob, axis=1)[:, -5]
    lowest = np.take_along_axis(prob, made.ids_BK, 1).min(1)
    swapped = lowest < fifth
    assert swapped.any()
    assert (fifth - lowest).max() <= 2 * labels.error_bound(form, classes)


@pytest.mark.parametrize("classes", [65_535, 65_536, 100_000])
def test_there_is_no_class_count_limit(classes):
    dtype = labels.id_dtype(classes)
    assert np.iinfo(dtype).max > classes - 1  # the fill value is never a class
    prob = np.full((1, classes), 0.5 / (classes - 1), dtype=np.float32)
    prob[0, classes - 1] = 0.5
    ids, kept = stored(Form("topk", 2), prob)
    assert ids.astype(dtype)[0, 0] == classes - 1
    made = labels.sparse_target(Target("marginal-smoothing", 2), ids, kept, classes)
    assert labels.to_dense(made, classes).sum() == pytest.approx(1, abs=1e-3)


def test_scores_stay_finite_and_serve_any_temperature():
    z = np.array([[0.0, -80_000.0, -5.0]], dtype=np.float32)
    kept = labels.encode_scores(z)
    assert np.isfinite(kept).all()
    for temperature in (0.2, 1.0, 4.0):
        expected = np.exp(z[0] / temperature) / np.exp(z[0] / temperature).sum()
        assert labels.softmax(kept, temperature)[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("text", ["topk", "topk:0", "topk:x", "topk:5:zip", "soft", "", "hard:1"])
def test_unknown_forms_are_refused(text):
    with pytest.raises(UsageError, match="the forms are"):
        labels.parse_form(text)


@pytest.mark.parametrize("text", ["marginal-smoothing", "topk:5", "hard:3", "marginal-renorm:0"])
def test_unknown_targets_are_refused(text):
    with pytest.raises(UsageError, match="the targets are"):
        labels.parse_target(text)


@pytest.mark.parametrize(
    ("form", "target"),
    [
        ("hard", "smoothing"),
        ("topk:5", "full"),
        ("topk:5", "marginal-smoothing:6"),
        ("hard", "full"),
    ],
)
def test_a_form_says_what_it_serves_instead(form, target):
    with pytest.raises(StoreMismatchError, match="it serves hard"):
        labels.check_target(labels.parse_form(form), labels.parse_target(target), 100)


def test_k_above_c_is_refused():
    with pytest.raises(UsageError, match="fewer than 11"):
        labels.check_form(labels.parse_form("topk:11"), 10)
    with pytest.raises(UsageError, match="fewer than 11"):
        labels.check_target(Form("full"), Target("marginal-smoothing", 11), 10)


@pytest.mark.parametrize("text", ["full", "logits", "hard", "topk:7", "topk:10:compact"])
def test_forms_are_written_as_they_are_read(text):
    assert str(labels.parse_form(text)) == text
