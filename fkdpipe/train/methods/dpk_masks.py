"""DPK's masks: which of the student's tokens are replaced by the teacher's.

A mask is boolean, True for tokens from the teacher.

Letters: B batch, D features, N tokens, M masked tokens, H, W the grid of tokens.

References:
    Zong et al., "Better Teacher Better Student: Dynamic Prior Knowledge for Knowledge
    Distillation", equations 5 to 7 and table 6.
    Song et al., "Feature Selection via Dependence Maximization", equation 5 (unbiased HSIC).
"""

from __future__ import annotations

from typing import Literal

import torch

Mask = Literal["random", "block", "grid"]

MIN_RATIO, MAX_RATIO = 0.10, 0.95
UNDEFINED_RATIO = 0.85  # used where CKA is undefined
GRID_RATIO = 0.75  # one of every four tokens comes from the student
_RECTANGLES = 16  # of a block-wise mask, more than enough to cover a map


def hsic(k_BB: torch.Tensor, l_BB: torch.Tensor) -> torch.Tensor:
    """float64 scalar: the unbiased estimator HSIC_1 of two Gram matrices, at least 4 x 4.

    [tr(KL) + (1'K1)(1'L1) / ((B-1)(B-2)) - 2/(B-2) 1'KL1] / (B(B-3)), diagonals set to zero.
    """
    n = len(k_BB)
    k = k_BB.double() - torch.diag(k_BB.double().diagonal())
    l = l_BB.double() - torch.diag(l_BB.double().diagonal())  # noqa: E741
    trace = (k * l.T).sum()
    means = k.sum() * l.sum() / ((n - 1) * (n - 2))
    cross = (k.sum(0) * l.sum(1)).sum() * 2 / (n - 2)
    return (trace + means - cross) / (n * (n - 3))


def cka(x_BD: torch.Tensor, y_BE: torch.Tensor) -> torch.Tensor:
    """float64 scalar in [-1, 1]; NaN where it is undefined (B < 4, or constant features).

    Features are centred over the batch first. This changes nothing in exact arithmetic, but avoids
    cancellation in float32.
    """
    if len(x_BD) < 4:
        return x_BD.new_full((), torch.nan, dtype=torch.float64)
    k, l = _gram(x_BD), _gram(y_BE)  # noqa: E741
    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()


def _gram(x_BD: torch.Tensor) -> torch.Tensor:
    x = x_BD.float()
    x = x - x.mean(0)
    return x @ x.T


def cosine(x_BD: torch.Tensor, y_BD: torch.Tensor) -> torch.Tensor:
    """float32 scalar: cosine similarity of student and teacher features, mean over the batch."""
    return torch.nn.functional.cosine_similarity(x_BD.float(), y_BD.float(), dim=1).mean()


def count(ratio: float, tokens: int) -> int:
    """M = floor(ratio N), at least 2 and at most N - 2.

    Args:
        ratio: clamped to [0.10, 0.95]; 0.85 replaces a non-finite value.
    """
    ratio = (
        min(max(ratio, MIN_RATIO), MAX_RATIO)
        if ratio == ratio and abs(ratio) < 1e9
        else UNDEFINED_RATIO
    )
    return min(max(int(ratio * tokens), 2), tokens - 2)


def draw(
    kind: Mask, batch: int, grid: tuple[int, int], masked: int, device: torch.device
) -> torch.Tensor:
    """Boolean (B, N) with M True tokens in each row, sampled independently for each image."""
    tokens = grid[0] * grid[1]
    rank_BN = torch.rand(batch, tokens, device=device)
    if kind == "block":
        rank_BN = rank_BN + _first_cover(batch, grid, device)
    elif kind == "grid":
        rank_BN = rank_BN + _kept_of_four(grid, device)
    mask_BN = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    return mask_BN.scatter_(1, rank_BN.argsort(1)[:, :masked], True)


def grid_count(grid: tuple[int, int]) -> int:
    """M of a grid mask: all but one of every 2 x 2 tokens."""
    return grid[0] * grid[1] - -(-grid[0] // 2) * -(-grid[1] // 2)


def _kept_of_four(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """float32 (N,): 1 at even rows and columns, which sort last and are never masked."""
    rows = torch.arange(grid[0], device=device) % 2 == 0
    columns = torch.arange(grid[1], device=device) % 2 == 0
    return (rows[:, None] & columns[None, :]).float().flatten()


def _first_cover(batch: int, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """float32 (B, N): index of the first of several random rectangles that covers each token.

    Areas range from 1/12 to 1/3 of the map, aspect ratios from 0.3 to 1 / 0.3, as in BEiT. Taking
    tokens in this order masks block by block until M are masked.
    """
    height, width = grid
    area, ratio, top, left = torch.rand(4, batch, _RECTANGLES, 1, 1, device=device)
    area = (1 / 12 + area * (1 / 3 - 1 / 12)) * height * width
    ratio = torch.exp((2 * ratio - 1) * torch.log(torch.tensor(1 / 0.3)))
    high = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top = (top * (height - high + 1)).floor()
    left = (left * (width - wide + 1)).floor()
    rows = torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device)[None, :]
    inside = (rows >= top) & (rows < top + high) & (columns >= left) & (columns < left + wide)
    number = torch.arange(_RECTANGLES, device=device)[:, None, None]
    first = torch.where(inside, number, _RECTANGLES).amin(1)
    return first.flatten(1).float()
