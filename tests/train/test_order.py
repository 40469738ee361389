"""The order of a run: every image once per pass, every crop once before any repeats."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fkdpipe.common.errors import UsageError
from fkdpipe.train.order import Order, share
from fkdpipe.train.schedule import Pass, learning_rate, stages
from fkdpipe.train.settings import OptimizerSettings, ScheduleSettings


def make(
    rows=100, *, unit=16, window=2, epochs=6, m=2, batch=12, seed=1, spread=False, **edges
) -> Order:
    return Order(
        np.arange(rows) * 2,  # every other row is usable
        unit_size=unit,
        window=window,
        stages=stages(epochs, m, **edges),
        batch_size=batch,
        seed=seed,
        independent=spread,
    )


def passes(epochs, m, *, single_first=0, single_last=0) -> list[Pass]:
    """The slow twin of stages: every pass of a run."""
    middle = epochs - single_first - single_last
    widths = [1] * single_first + [m] * (middle // m) + [1] * (middle % m + single_last)
    begins = np.cumsum([0, *widths]).tolist()
    return [Pass(k, begins[k], width, begins[k]) for k, width in enumerate(widths)]


def rows_of(step) -> list[int]:
    return [row for piece in step.pieces for row in piece.rows.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    middle=st.integers(0, 9), m=st.integers(1, 4), first=st.integers(0, 3), last=st.integers(0, 3)
)
def test_stages_are_runs_of_passes_of_the_same_m(middle, m, first, last):
    edges = {"single_first": first, "single_last": last}
    found = stages(middle + first + last, m, **edges)
    every = [stage.passed(k) for stage in found for k in range(stage.count)]
    assert every == passes(middle + first + last, m, **edges)
    assert all(a.first.m != b.first.m for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("spread", [False, True])
def test_every_step_knows_its_pass_and_every_pass_its_first_step(spread):
    order = make(rows=50, epochs=11, m=2, batch=14, single_first=2, single_last=1, spread=spread)
    begins = {}
    for step in order.steps():
        for k in range(step.batches):
            assert order.pass_of(step.index + k) == step.passed.index
        begins.setdefault(step.passed.index, step.index)
    count = len(passes(11, 2, single_first=2, single_last=1))
    for index in range(count):
        assert order.first_step(index) == min(s for p, s in begins.items() if p >= index)
    assert order.first_step(count) == len(order)
    assert order.pass_of(len(order)) == count


def test_each_pass_has_every_image_once():
    order = make()
    seen = Counter()
    for step in order.steps():
        for piece in step.pieces:
            seen.update((piece.window.passed.index, row) for row in piece.rows.tolist())
    assert len(seen) == 3 * 100
    assert set(seen.values()) == {1}


def test_passes_follow_one_another_without_a_short_batch():
    sizes = [step.images for step in make().steps()]
    assert sizes == [6] * 50  # 3 passes of 100 images, 6 images a step


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 90),
    unit=st.integers(1, 40),
    window=st.integers(1, 5),
    epochs=st.integers(1, 9),
    m=st.integers(1, 4),
    images=st.integers(1, 20),
    world=st.integers(1, 4),
)
def test_no_image_is_lost_or_doubled(rows, unit, window, epochs, m, images, world):
    order = make(rows, unit=unit, window=window, epochs=epochs, m=m, batch=images * m)
    steps = list(order.steps())
    assert len(steps) == len(order)
    assert [step.index for step in steps] == list(range(len(steps)))
    crops = Counter()
    for step in steps:
        shared = [
            r for k in range(world) for p in share(step, k, world)[1] for r in p.rows.tolist()
        ]
        assert shared == rows_of(step)
        counts = [sum(len(p.rows) for p in share(step, k, world)[1]) for k in range(world)]
        few = step.passed.m == 1 and step.images < 2 * world  # some would get a single crop
        assert max(counts) - min(counts) <= (3 if few else 1)
        for piece in step.pieces:
            for row in piece.rows.tolist():
                crops[row] += piece.window.passed.m
    assert set(crops.values()) == {epochs}


@pytest.mark.parametrize("start", [0, 1, 7, 16, 17, 33, 49, 50])
def test_a_run_resumes_at_any_step_with_the_very_next_batch(start):
    whole = list(make().steps())
    rest = list(make().steps(start))
    assert [s.index for s in rest] == [s.index for s in whole[start:]]
    for a, b in zip(rest, whole[start:], strict=True):
        assert rows_of(a) == rows_of(b)
        assert a.passed == b.passed


def test_resuming_where_m_changes():
    edges = {"single_first": 1, "single_last": 2}
    whole = list(make(epochs=9, **edges).steps())
    for start in range(len(whole)):
        rest = list(make(epochs=9, **edges).steps(start))
        assert [rows_of(s) for s in rest] == [rows_of(s) for s in whole[start:]]


def spread_batches(order, rank=0, world=1) -> dict[int, list[tuple[int, int, int]]]:
    """The slow twin of spreading: optimiser step to (pass, row, crop of the pass)."""
    batches = {}
    for step in order.steps():
        _, pieces = share(step, rank, world)
        for k in range(step.batches):
            batches[step.index + k] = [
                (p.window.passed.index, row, k) for p in pieces for row in p.rows.tolist()
            ]
    return batches


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 90),
    unit=st.integers(1, 40),
    epochs=st.integers(1, 9),
    m=st.integers(1, 4),
    per_m=st.integers(1, 12),
    first=st.integers(0, 1),
    world=st.integers(1, 4),
)
def test_spread_batches_hold_every_crop_once_and_no_image_twice(
    rows, unit, epochs, m, per_m, first, world
):
    edges = {"single_first": min(first, epochs)}
    order = make(rows, unit=unit, epochs=epochs, m=m, batch=per_m * m, spread=True, **edges)
    batches = spread_batches(order)
    assert list(batches) == list(range(len(order)))
    for batch in batches.values():
        images = [row for _, row, _ in batch]
        assert len(set(images)) == len(images) <= max(per_m * m, 3 if per_m * m == 2 else 1)
    seen = Counter(crop for batch in batches.values() for crop in batch)
    widths = {p.index: p.m for p in passes(epochs, m, **edges)}
    every = {(p, 2 * row, k) for p, width in widths.items() for row in range(rows)
             for k in range(width)}  # fmt: skip
    assert set(seen) == every
    assert set(seen.values()) == {1}
    shares = [spread_batches(order, rank, world) for rank in range(world)]
    for index, batch in batches.items():
        assert [crop for each in shares for crop in each[index]] == batch


def test_spread_batches_of_a_pass_are_equally_long():
    order = make(101, m=2, batch=12, epochs=6, spread=True)
    assert {step.images for step in order.steps()} == {11, 12}
    assert len(order) == 3 * 9 * 2


def test_a_spread_run_resumes_in_the_block_that_holds_the_step():
    for edges in ({}, {"single_first": 1, "single_last": 2}):
        order = make(epochs=9, spread=True, **edges)
        whole = {k: step for step in order.steps() for k in range(step.index, len(order))}
        for start in range(len(order)):
            first = next(order.steps(start))
            assert first.index <= start < first.index + first.batches
            assert rows_of(first) == rows_of(whole[start])
            rest = list(order.steps(start))
            assert sum(step.batches for step in rest) == len(order) - first.index


def test_the_order_depends_on_the_seed_and_differs_between_passes():
    first, second = (rows_of_pass(make(seed=s), 0) for s in (1, 2))
    assert first != second
    assert first == rows_of_pass(make(seed=1), 0)
    assert first != rows_of_pass(make(seed=1), 1)


def rows_of_pass(order, index) -> list[int]:
    passed = passes(6, 2)[index]
    return [row for window in order.windows(passed) for row in window.rows.tolist()]


def test_a_window_mixes_its_units_and_no_others():
    order = make(rows=160, unit=32, window=3)
    for window in order.windows(passes(6, 2)[0]):
        assert {row // 32 for row in window.rows.tolist()} == set(window.units)
        units = [row // 32 for row in window.rows.tolist()]
        if len(window.units) > 1:
            assert units != sorted(units)


def test_windows_follow_one_another_across_passes_and_changes_of_m():
    order = make(epochs=7, single_first=1)
    listed = [w for p in passes(7, 2, single_first=1) for w in order.windows(p)]
    window = order.window(listed[0].passed, 0)
    for expected in listed[1:]:
        window = order.following(window)
        assert window.key == expected.key
        assert window.rows.tolist() == expected.rows.tolist()
    assert order.following(window) is None


def test_passes_and_crops():
    found = stages(10, 4, single_first=1, single_last=2)
    made = [stage.passed(k) for stage in found for k in range(stage.count)]
    assert [(p.m, p.epoch, p.first_crop) for p in made] == [
        (1, 0, 0),
        (4, 1, 1),
        (1, 5, 5),
        (1, 6, 6),
        (1, 7, 7),
        (1, 8, 8),
        (1, 9, 9),
    ]
    assert [(stage.first.m, stage.count) for stage in stages(8, 4)] == [(4, 2)]


def test_a_batch_must_hold_whole_images():
    with pytest.raises(UsageError, match="not a multiple"):
        make(m=5, batch=12, epochs=5)


def test_learning_rates_in_closed_form():
    base = OptimizerSettings(lr=0.4)

    def rate(epoch, **schedule):
        return learning_rate(ScheduleSettings(**schedule), base, epoch=epoch, epochs=100)

    assert rate(0) == pytest.approx(0.4)
    assert rate(50) == pytest.approx(0.2)
    assert rate(25) == pytest.approx(0.4 * (1 + 2**-0.5) / 2)
    assert rate(100, min_lr=0.1) == pytest.approx(0.1)
    assert rate(75, name="linear") == pytest.approx(0.1)
    assert rate(99, name="constant") == pytest.approx(0.4)
    steps = {"name": "step", "milestones": (30, 60), "gamma": 0.5}
    assert [rate(e, **steps) for e in (29, 30, 60)] == pytest.approx([0.4, 0.2, 0.1])
    assert rate(0, warmup_epochs=4, warmup_lr=0.1) == pytest.approx(0.1)
    assert rate(2, warmup_epochs=4, warmup_lr=0.1) == pytest.approx(0.25)
    assert rate(4, warmup_epochs=4) == pytest.approx(0.4 * (1 + np.cos(np.pi * 0.04)) / 2)


def test_cosine_is_timms():
    import torch
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    theirs = CosineLRScheduler(optimizer, t_initial=100, warmup_t=5, warmup_lr_init=1e-6)
    schedule = ScheduleSettings(warmup_epochs=5, warmup_lr=1e-6)
    for epoch in range(100):
        theirs.step(epoch)
        ours = learning_rate(schedule, OptimizerSettings(lr=0.4), epoch=epoch, epochs=100)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(ours)
