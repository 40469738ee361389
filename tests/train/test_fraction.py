"""A fraction of the data: so many of every class, the same wherever the list comes from."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import CLASSES
from pipeline import make_store, prepare_run, train_settings

from fkdpipe.common.errors import UsageError
from fkdpipe.pixels import crops


def slow_twin(class_N, order_N, share) -> list[int]:
    kept = []
    for name in set(class_N.tolist()):
        of_class = [row for row in order_N.tolist() if class_N[row] == name]
        kept += of_class[: math.ceil(share * len(of_class))]
    return [row for row in order_N.tolist() if row in kept]


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 1.0])
def test_a_share_of_every_class_agrees_with_its_slow_twin(share):
    random = np.random.default_rng(0)
    class_N = random.integers(-1, 4, size=120)
    order = random.permutation(120)
    assert crops.per_class(class_N, order, share).tolist() == slow_twin(class_N, order, share)


def test_a_flat_folder_is_one_class():
    kept = crops.per_class(np.full(30, -1), np.arange(30), 0.1)
    assert kept.tolist() == [0, 1, 2]


def chosen(run) -> set[str]:
    data = run.feed.data
    return set(data.keys[data.rows])


def test_a_run_on_a_fraction_sees_these_images_alone_from_folder_or_store(
    tmp_path, folder, teacher
):
    store = make_store(tmp_path / "store", folder, [teacher], seed=3)
    settings = train_settings(target="hard", fraction=0.25, seed=7)
    from_store = prepare_run(tmp_path / "a", folder, store, settings)
    settings = train_settings(target="ground-truth", fraction=0.25, seed=7)
    from_folder = prepare_run(tmp_path / "b", folder, None, settings)
    assert chosen(from_store) == chosen(from_folder)
    names = [key.split("/")[0] for key in chosen(from_store)]
    assert {name: names.count(name) for name in CLASSES} == {
        "ash": 2, "beech": 2, "cedar": 5, "date palm": 2, "élm": 2,
    }  # fmt: skip
    seen = {key for batch in from_store.crops.stream() for key in
            from_store.feed.data.keys[batch.rows]}  # fmt: skip
    assert seen == chosen(from_store)
    assert from_store.feed.data.facts["images"] == 13
    other = train_settings(target="hard", fraction=0.25, seed=8)
    assert chosen(prepare_run(tmp_path / "c", folder, store, other)) != chosen(from_store)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_fraction_that_is_no_share_is_refused(fraction):
    with pytest.raises(UsageError, match="fraction must be a number above 0 and at most 1"):
        train_settings(fraction=fraction)
