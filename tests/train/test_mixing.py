"""Mixup and CutMix: torchvision's formulas, our own partners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipeline import make_store, prepare_run, train_settings
from torchvision.transforms import v2

from fkdpipe.common.errors import UsageError
from fkdpipe.train import mixing
from fkdpipe.train.mixing import Mix
from fkdpipe.train.settings import MixingSettings
from fkdpipe.train.step import prepare

MIXUP, CUTMIX = MixingSettings(mixup=0.8), MixingSettings(cutmix=1.0)


def drawn(settings=MIXUP, images=24, m=2, **changes) -> Mix:
    where = {"seed": 3, "step": 5, "first_image": 0, **changes}
    return mixing.draw(settings, images=images, m=m, **where)


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX, MixingSettings(0.5, 0.5)])
@pytest.mark.parametrize(("images", "m"), [(24, 1), (24, 4), (13, 2), (2, 3)])
def test_every_crop_has_one_partner_of_another_image_in_its_block(settings, images, m):
    mix = drawn(settings, images, m)
    partners = mix.partner_B.numpy()
    assert sorted(partners) == list(range(images * m))
    own, other = np.arange(images * m) // m, partners // m
    assert (own != other).all()
    assert (own // settings.block == other // settings.block).all()


def test_a_lonely_image_is_left_alone():
    mix = drawn(MIXUP, images=9, m=2)
    assert mix.own_B[-2:].tolist() == [1.0, 1.0]
    x = torch.rand(18, 3, 4, 4)
    assert torch.equal(mixing.mix_pixels(mix, x)[-2:], x[-2:])


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX])
def test_processes_that_share_a_step_draw_what_one_would(settings):
    whole = drawn(settings, images=32, m=2)
    for first in (0, 8, 16, 24):
        part = drawn(settings, images=8, m=2, first_image=first)
        rows = slice(first * 2, first * 2 + 16)
        assert torch.equal(part.partner_B + first * 2, whole.partner_B[rows])
        assert torch.equal(part.own_B, whole.own_B[rows])
        assert torch.equal(part.box_B4.nan_to_num(-1), whole.box_B4[rows].nan_to_num(-1))


def test_other_steps_and_blocks_draw_other_numbers():
    a, b = drawn(), drawn(step=6)
    assert not torch.equal(a.own_B, b.own_B)
    assert len(a.own_B.unique()) == 3  # one for each block of eight images


def test_the_coefficient_follows_its_distribution():
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))."""
    own = torch.cat([drawn(MIXUP, images=8, m=1, step=step).own_B[:1] for step in range(4000)])
    assert float(own.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(own.var()) == pytest.approx(1 / (4 * 2.6), abs=0.005)


def test_the_probability_and_the_switch_are_kept():
    both = MixingSettings(mixup=0.8, cutmix=1.0, probability=0.6, switch=0.25)
    mixes = [drawn(both, images=2, m=1, step=step) for step in range(4000)]
    cut = np.array([not mix.box_B4[0].isnan().any() for mix in mixes])
    plain = np.array([float(mix.own_B[0]) == 1.0 for mix in mixes])
    assert plain.mean() == pytest.approx(0.4, abs=0.03)
    assert cut[~plain].mean() == pytest.approx(0.25, abs=0.03)


def test_mixup_is_torchvisions_formula(monkeypatch):
    """Given the same coefficient, and partners rolled by one as torchvision pairs them."""
    x, y = torch.rand(6, 3, 8, 8), torch.randint(0, 5, (6,))
    transform = v2.MixUp(alpha=0.8, num_classes=5)
    monkeypatch.setattr(transform._dist, "sample", lambda shape: torch.tensor([0.3]))
    wanted_x, wanted_y = transform(x, y)
    mix = Mix(torch.arange(6).roll(1), torch.full((6,), 0.3), torch.full((6, 4), torch.nan))
    one_hot = torch.nn.functional.one_hot(y, 5).float()
    torch.testing.assert_close(mixing.mix_pixels(mix, x), wanted_x)
    torch.testing.assert_close(mixing.mix_targets(mix, one_hot, (8, 8)), wanted_y)


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_is_torchvisions_formula(seed):
    """The same patch: torchvision draws its centre in whole pixels, ours as a share of the side."""
    torch.manual_seed(seed)
    x = torch.arange(6.0)[:, None, None, None].repeat(1, 3, 12, 20)  # so that a patch shows
    y = torch.randint(0, 5, (6,))
    wanted_x, wanted_y = v2.CutMix(alpha=1.0, num_classes=5)(x, y)
    patch = (wanted_x != x)[0, 0]
    rows, columns = patch.any(1).nonzero().ravel(), patch.any(0).nonzero().ravel()
    if not len(rows):
        rows, columns = torch.tensor([0, -1]), torch.tensor([0, -1])  # an empty patch
    edges = [rows[0] / 12, columns[0] / 20, (rows[-1] + 1) / 12, (columns[-1] + 1) / 20]
    box = torch.tensor(edges) + 1e-4
    mix = Mix(torch.arange(6).roll(1), torch.full((6,), 0.0), box.repeat(6, 1))
    one_hot = torch.nn.functional.one_hot(y, 5).float()
    assert torch.equal(mixing.mix_pixels(mix, x), wanted_x)
    torch.testing.assert_close(mixing.mix_targets(mix, one_hot, (12, 20)), wanted_y)


def test_the_patch_has_the_area_that_the_coefficient_says():
    mixes = [drawn(CUTMIX, images=2, m=1, step=step) for step in range(500)]
    inner = [m for m in mixes if (m.box_B4[0] > 0.05).all() and (m.box_B4[0] < 0.95).all()]
    assert len(inner) > 30
    for mix in inner:
        share = float(mixing.own_share(mix, (224, 224))[0].mean())
        assert share == pytest.approx(float(mix.own_B[0]), abs=0.02)


@pytest.fixture(scope="module")
def store(tmp_path_factory, folder, teacher):
    return make_store(tmp_path_factory.mktemp("stores") / "store", folder, [teacher])


def test_a_batch_is_mixed_with_its_targets(tmp_path, folder, store):
    settings = train_settings(
        mixing=MixingSettings(mixup=0.8, block=2), batch_size=16, crops_per_image=2
    )
    run = prepare_run(tmp_path / "run", folder, store, settings)
    plain = prepare_run(tmp_path / "plain", folder, store, train_settings())
    batch = next(iter(run.crops.stream()))
    (x, wanted), (x0, wanted0) = prepare(run, batch), prepare(plain, batch)
    mix = mixing.draw(settings.mixing, seed=0, step=0, first_image=0, images=8, m=2)
    own = mix.own_B[:, None]
    partner = mix.partner_B
    torch.testing.assert_close(
        wanted.prob_BC, own * wanted0.prob_BC + (1 - own) * wanted0.prob_BC[partner]
    )
    own = own[:, :, None, None]
    torch.testing.assert_close(x, own * x0 + (1 - own) * x0[partner])


def test_batches_that_blocks_do_not_divide_are_refused(tmp_path, folder, store):
    settings = train_settings(mixing=MixingSettings(mixup=0.8, block=3))
    with pytest.raises(UsageError, match="3 images mixed with each other"):
        prepare_run(tmp_path / "run", folder, store, settings)
