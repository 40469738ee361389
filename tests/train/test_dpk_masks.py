"""Mask ratio and masks of DPK: closed forms of the unbiased HSIC, counts, shapes of masks."""

from __future__ import annotations

import math

import pytest
import torch

from fkdpipe.train.methods import dpk_masks

CPU = torch.device("cpu")


def outer(labels) -> torch.Tensor:
    c = torch.tensor(labels, dtype=torch.float64)
    return c[:, None] * c[None, :]


def test_hsic_of_clusters_in_closed_form():
    c1, c2 = outer([1, 1, -1, -1]), outer([1, -1, 1, -1])
    assert dpk_masks.hsic(c1, c1).item() == pytest.approx(8 / 3)
    assert dpk_masks.hsic(c1, c2).item() == pytest.approx(-4 / 3)
    eight = outer([1] * 4 + [-1] * 4)
    assert dpk_masks.hsic(eight, eight).item() == pytest.approx(48 / 35)
    identity = torch.eye(6)
    assert dpk_masks.hsic(identity, identity).item() == 0


def test_hsic_equals_the_u_centred_inner_product():
    """The other form of the same estimator: <U(K), U(L)> / (n (n - 3))."""
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    expected = (u_centred(k) * u_centred(l)).sum() / (9 * 6)
    assert torch.allclose(dpk_masks.hsic(k, l), expected)


def u_centred(k: torch.Tensor) -> torch.Tensor:
    k, n = k - torch.diag(k.diagonal()), len(k)
    rows = k.sum(1, keepdim=True) / (n - 2)
    made = k - rows - rows.T + k.sum() / ((n - 1) * (n - 2))
    return made - torch.diag(made.diagonal())


def test_cka_is_one_for_the_same_geometry():
    x = torch.randn(12, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert dpk_masks.cka(x, x).item() == pytest.approx(1)
    assert dpk_masks.cka(x, -3 * x @ rotation + torch.randn(6)).item() == pytest.approx(1, abs=1e-5)


def test_cka_can_be_negative():
    c1 = torch.tensor([[1.0], [1], [-1], [-1]])
    c2 = torch.tensor([[1.0], [-1], [1], [-1]])
    assert dpk_masks.cka(c1, c2).item() == pytest.approx(-0.5)


def test_a_large_common_mean_costs_no_digits():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(16, 40, generator=random)
    y = x + 0.1 * torch.randn(16, 40, generator=random)
    plain = dpk_masks.cka(x, y)
    assert dpk_masks.cka(x + 1000, y + 1000).item() == pytest.approx(plain.item(), abs=1e-4)
    wide, other = x.double() + 10, y.double() + 10  # not centred, in digits enough
    k, l = wide @ wide.T, other @ other.T  # noqa: E741
    exact = dpk_masks.hsic(k, l) / (dpk_masks.hsic(k, k) * dpk_masks.hsic(l, l)).sqrt()
    assert plain.item() == pytest.approx(exact.item(), abs=1e-4)


def test_undefined_cka_has_the_codes_own_ratio():
    assert math.isnan(dpk_masks.cka(torch.ones(8, 3), torch.ones(8, 3)).item())
    assert math.isnan(dpk_masks.cka(torch.randn(3, 3), torch.randn(3, 3)).item())
    assert dpk_masks.count(math.nan, 100) == dpk_masks.count(math.inf, 100) == 85


@pytest.mark.parametrize(
    ("ratio", "tokens", "masked"),
    [(0.5, 49, 24), (0.0, 49, 4), (-0.3, 49, 4), (1.6, 49, 46), (0.95, 4, 2), (0.1, 4, 2)],
)
def test_counts_are_floored_and_leave_two_on_each_side(ratio, tokens, masked):
    assert dpk_masks.count(ratio, tokens) == masked


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (4, 6)])
def test_every_row_of_a_mask_has_the_same_count(kind, grid):
    torch.manual_seed(0)
    masked = dpk_masks.grid_count(grid) if kind == "grid" else (grid[0] * grid[1]) // 2
    mask = dpk_masks.draw(kind, 32, grid, masked, CPU)
    assert mask.shape == (32, grid[0] * grid[1])
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [masked] * 32
    if kind != "grid":
        assert len(mask.unique(dim=0)) > 1  # drawn for each image
    assert torch.equal(mask, again(kind, grid, masked))


def again(kind, grid, masked):
    torch.manual_seed(0)
    return dpk_masks.draw(kind, 32, grid, masked, CPU)


def test_a_random_mask_treats_all_tokens_alike():
    torch.manual_seed(0)
    share = dpk_masks.draw("random", 20_000, (4, 4), 6, CPU).float().mean(0)
    assert (share - 6 / 16).abs().max() < 5 * math.sqrt(6 / 16 * 10 / 16 / 20_000)


def test_a_grid_mask_keeps_one_of_every_two_by_two():
    masked = dpk_masks.grid_count((4, 6))
    mask = dpk_masks.draw("grid", 3, (4, 6), masked, CPU).view(3, 4, 6)
    assert masked == 24 * dpk_masks.GRID_RATIO
    assert (~mask[:, ::2, ::2]).all()
    assert mask[:, 1::2].all()
    assert mask[:, :, 1::2].all()
    assert dpk_masks.grid_count((7, 7)) == 49 - 16


def test_block_masks_hang_together():
    """Neighbours agree more often than in random masks of the same count."""
    torch.manual_seed(0)
    together = {}
    for kind in ("random", "block"):
        mask = dpk_masks.draw(kind, 200, (14, 14), 98, CPU).view(200, 14, 14)
        together[kind] = (mask[:, :, 1:] == mask[:, :, :-1]).float().mean().item()
    assert together["random"] == pytest.approx(0.5, abs=0.02)
    assert together["block"] > 0.8
