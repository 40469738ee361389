"""The crop distribution: torchvision's, reproducible in any order and on any machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import crop_params
from torchvision.transforms import RandomResizedCrop

from fkdpipe.common.errors import UsageError
from fkdpipe.pixels import crops
from fkdpipe.pixels.crops import CropDistribution

KEYS = [f"class/{k}.jpg" for k in range(40)]
IDS = crops.image_ids(KEYS)
SIZES = np.array([[300 + 7 * k, 500 - 11 * k] for k in range(40)])


def draw(distribution=CropDistribution(), seed=3, rows=slice(None), which=range(6)):
    return crops.sample(
        distribution,
        seed=seed,
        image_id_N=IDS[rows],
        size_N2=SIZES[rows],
        crops_M=np.asarray(which),
    )


def test_a_crop_depends_on_seed_key_and_index_alone():
    whole = draw()
    reverse = slice(None, None, -1)
    assert np.array_equal(draw(rows=reverse).box_NM4, whole.box_NM4[::-1])
    assert np.array_equal(draw(which=[4]).box_NM4[:, 0], whole.box_NM4[:, 4])
    assert np.array_equal(draw(which=[4]).flip_NM[:, 0], whole.flip_NM[:, 4])
    alone = draw(rows=slice(7, 8))
    assert np.array_equal(alone.box_NM4[0], whole.box_NM4[7])
    assert not np.array_equal(draw(seed=4).box_NM4, whole.box_NM4)


def test_the_stream_is_frozen():
    """Stores with derived boxes depend on it: a change needs a new DISTRIBUTION_VERSION."""
    made = draw(which=np.arange(50))
    digest = hashlib.sha256(made.box_NM4.astype("<u2").tobytes() + made.flip_NM.tobytes())
    assert crops.DISTRIBUTION_VERSION == 1
    assert digest.hexdigest()[:16] == "218cea96212651f9"


LAWS = [
    CropDistribution(),
    CropDistribution(scale=(0.25, 1.0)),
    CropDistribution(scale=(0.9, 1.0), ratio=(0.2, 5.0)),
]


@pytest.mark.parametrize("distribution", LAWS)
def test_the_distribution_is_torchvisions_step_by_step(distribution):
    state = _states(seed=3, count=40)
    made = draw(distribution)
    for n in range(40):
        for m in range(6):

            def uniform(attempt, number, s=state[n, m]):
                return float(crops._uniform(crops._draw(s[None], 4 * attempt + number))[0])

            expected = crop_params(distribution, uniform, *SIZES[n].tolist())
            assert tuple(made.box_NM4[n, m].tolist()) == expected


def _states(seed: int, count: int) -> np.ndarray:
    image = crops._mix(crops._mix(seed) ^ IDS[:count])[:, None]
    crop = crops._mix(np.arange(6, dtype=np.uint64) + crops._GOLDEN)
    return crops._stream(crops._mix(image ^ crop), crops._BOX)


@pytest.mark.parametrize("size", [(375, 500), (500, 120), (64, 64)])
def test_the_distribution_is_torchvisions(size):
    """Means of 4,000 draws of each; the bound is five standard errors."""
    distribution, count = CropDistribution(), 4000
    torch.manual_seed(0)
    blank = torch.empty(3, *size)
    theirs = np.array(
        [
            RandomResizedCrop.get_params(blank, distribution.scale, distribution.ratio)
            for _ in range(count)
        ],
        dtype=np.float64,
    )
    ours = crops.sample(
        distribution,
        seed=1,
        image_id_N=IDS[:1],
        size_N2=np.array([size]),
        crops_M=np.arange(count),
    )
    boxes = ours.box_NM4[0].astype(np.float64)
    error = np.sqrt((theirs.var(0) + boxes.var(0)) / count)
    assert (np.abs(boxes.mean(0) - theirs.mean(0)) <= 5 * error + 1e-9).all()
    assert abs(ours.flip_NM.mean() - 0.5) < 5 * 0.5 / count**0.5


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
    seed=st.integers(0, 2**63 - 1),
    low=st.floats(0.01, 1.0),
    ratio=st.floats(0.1, 1.0),
)
def test_boxes_lie_inside_their_image(height, width, seed, low, ratio):
    distribution = CropDistribution(scale=(low, 1.0), ratio=(ratio, 1 / ratio))
    size = np.array([[height, width]])
    made = crops.sample(
        distribution, seed=seed, image_id_N=IDS[:1], size_N2=size, crops_M=np.arange(20)
    )
    assert not crops.boxes_outside(made.box_NM4, size).any()


def test_no_try_succeeds_takes_the_centre():
    made = crops.sample(
        CropDistribution(scale=(1.0, 1.0), ratio=(3.0, 4.0)),
        seed=0,
        image_id_N=IDS[:1],
        size_N2=np.array([[300, 300]]),
        crops_M=np.arange(3),
    )
    assert made.box_NM4[0].tolist() == [[100, 0, 100, 300]] * 3


def test_box_axes_are_top_left_height_width():
    """A tall image: tops range further than lefts, heights than widths."""
    made = crops.sample(
        CropDistribution(),
        seed=0,
        image_id_N=IDS[:1],
        size_N2=np.array([[900, 90]]),
        crops_M=np.arange(200),
    )
    top, left, height, width = made.box_NM4[0].T.astype(int)
    assert top.max() > 90
    assert (left + width).max() <= 90
    assert (top + height).max() > 500


def test_exp_and_log_need_no_maths_library():
    x = np.linspace(-5, 5, 2001)
    assert np.allclose(crops._exp(x), np.exp(x), rtol=2e-15, atol=0)
    assert crops._log(4 / 3) == pytest.approx(np.log(4 / 3), rel=1e-15)


def test_flip_probability():
    assert not draw(CropDistribution(flip=0.0)).flip_NM.any()
    assert draw(CropDistribution(flip=1.0)).flip_NM.all()


@pytest.mark.parametrize(
    "bad",
    [{"scale": (0.0, 1.0)}, {"scale": (0.5, 0.2)}, {"ratio": (-1.0, 1.0)}, {"flip": 1.5}],
)
def test_a_distribution_that_cannot_be_is_refused(bad):
    with pytest.raises(UsageError):
        CropDistribution(**bad)


def test_random_order_depends_on_images_not_on_their_order():
    order = crops.random_order(5, IDS)
    assert sorted(order.tolist()) == list(range(40))
    shuffled = np.random.default_rng(0).permutation(40)
    again = crops.random_order(5, IDS[shuffled])
    assert np.array_equal(IDS[shuffled][again], IDS[order])
