"""No batch, share or part of a single crop, of which BatchNorm has no variance.

Where none would arise, the order is the plain one.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import prepare_run, train_settings

from fkdpipe.train import loop, metrics
from fkdpipe.train.order import Order, share
from fkdpipe.train.schedule import stages


def make(rows: int, epochs: int, m: int, batch: int, *, spread: bool = False, **edges) -> Order:
    return Order(
        np.arange(rows),
        unit_size=16,
        window=2,
        stages=stages(epochs, m, **edges),
        batch_size=batch,
        seed=1,
        independent=spread,
    )


def plain_sizes(rows: int, epochs: int, m: int, batch: int, *, spread: bool) -> list[int]:
    """Images of each step (block, if spread): full ones, and the rest in the last."""
    sizes = []
    for stage in stages(epochs, m):
        if spread:
            blocks = -(-rows // batch)
            cuts = [rows * k // blocks for k in range(blocks + 1)]
            sizes += [b - a for a, b in itertools.pairwise(cuts)] * stage.count
        else:
            images, full = rows * stage.count, batch // stage.first.m
            rest = images % full
            sizes += [full] * (images // full) + [rest] * bool(rest)
    return sizes


def plain_shares(images: int, world: int, block: int) -> list[int]:
    blocks = -(-images // block)
    cuts = [min(images, blocks * r // world * block) for r in range(world + 1)]
    return [b - a for a, b in itertools.pairwise(cuts)]


def shares_of(step, world: int, block: int) -> list[int]:
    return [
        sum(len(piece.rows) for piece in share(step, rank, world, block)[1])
        for rank in range(world)
    ]


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(2, 60),
    epochs=st.integers(1, 7),
    m=st.integers(1, 3),
    images=st.integers(1, 9),
    world=st.integers(1, 4),
    block=st.integers(1, 4),
    spread=st.booleans(),
)
def test_no_process_gets_a_single_crop(rows, epochs, m, images, world, block, spread):
    """images: of a full share of a process, in blocks."""
    batch = images * block * world * m
    order = make(rows, epochs, m, batch, spread=spread)
    steps = list(order.steps())
    assert sum(step.batches for step in steps) == len(order)
    plain = plain_sizes(rows, epochs, m, batch, spread=spread)
    lonely_steps = any(
        size == 1 and (spread or stage_m == 1)
        for size, stage_m in zip(plain, of_stage(rows, epochs, m, batch, spread), strict=True)
    )
    if not lonely_steps:
        assert [step.images for step in steps] == plain
    for step in steps:
        crops_per_image = 1 if spread else step.passed.m
        shares = shares_of(step, world, block)
        assert sum(shares) == step.images
        begins = [share(step, rank, world, block)[0] for rank in range(world)]
        assert all(begin % block == 0 or begin == step.images for begin in begins)
        full = step.full // world
        if full * crops_per_image >= 2:
            assert all(size == 0 or size * crops_per_image >= 2 for size in shares)
        expected = plain_shares(step.images, world, block)
        if all(size * crops_per_image != 1 for size in expected) or full * crops_per_image < 2:
            assert shares == expected


def of_stage(rows: int, epochs: int, m: int, batch: int, spread: bool) -> list[int]:
    """m of each of the plain steps."""
    result = []
    for stage in stages(epochs, m):
        if spread:
            result += [stage.first.m] * (-(-rows // batch) * stage.count)
        else:
            result += [stage.first.m] * -(-rows * stage.count // (batch // stage.first.m))
    return result


@pytest.mark.parametrize(
    ("rows", "batch", "sizes"),
    [(25, 12, [12, 11, 2]), (25, 24, [23, 2]), (25, 22, [22, 3]), (24, 12, [12, 12]),
     (7, 2, [2, 2, 3]), (3, 1, [1, 1, 1]), (1, 12, [1])],
)  # fmt: skip
def test_a_last_image_alone_takes_its_neighbour(rows, batch, sizes):
    order = make(rows, 1, 1, batch)
    assert [step.images for step in order.steps()] == sizes
    assert len(order) == len(sizes)
    for start in range(len(sizes)):
        assert [step.images for step in order.steps(start)] == sizes[start:]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 25])
@pytest.mark.parametrize("batch", [1, 2, 3, 12, 24])
@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_passes_and_steps_still_agree(rows, batch, epochs):
    order = make(rows, epochs, 1, batch)
    begins = [step.passed.index for step in order.steps()]
    assert [order.pass_of(k) for k in range(len(order))] == begins
    for index in range(epochs):
        first = [k for k, passed in enumerate(begins) if passed >= index]
        assert order.first_step(index) == (first[0] if first else len(order))


@pytest.fixture
def images_25(tmp_path, cut):
    """25 training images of two classes and no others."""
    for k in range(25):
        inside = tmp_path / "data" / f"c{k % 2}"
        inside.mkdir(parents=True, exist_ok=True)
        cut(k, 50, 60).save(inside / f"{k}.jpg")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("batch", "accumulate", "m"), [(12, 1, 1), (12, 5, 1), (24, 1, 1), (24, 8, 1), (24, 7, 2)]
)
def test_a_student_with_batchnorm_trains_to_the_end(tmp_path, images_25, batch, accumulate, m):
    options = train_settings(
        target="ground-truth", epochs=m, crops_per_image=m, batch_size=batch, accumulate=accumulate
    )
    run = prepare_run(tmp_path / "run", images_25, None, options)
    parts = []
    run.learner.student.register_forward_pre_hook(lambda _, args: parts.append(len(args[0])))
    result = loop.train(run)
    assert result.steps == run.steps
    assert sum(parts) == 25 * m
    assert min(parts) >= 2


@pytest.mark.parametrize("batch", [22, 24])
def test_two_processes_of_batchnorm_train_to_the_end(tmp_path, images_25, batch):
    line = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "fkdpipe", "train", str(images_25), "--student", "test_resnet", "--epochs", "1",
        "--batch-size", str(batch), "--out", str(tmp_path / "run"), "--device", "cpu",
        "--set", "size=32", "--set", "log_every=1",
    ]  # fmt: skip
    done = subprocess.run(
        line,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [x["step"] for x in lines if x["kind"] == "train"] == [1, 2]
