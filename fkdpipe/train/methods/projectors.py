"""ScaleKD's projectors: from a student's map to the teacher's width and grid.

The cross-attention projector (CAP) lets a grid of queries gather the student's map; the linear and
the convolutional one are what table 9b compares it with.

Letters: B batch, C channels of the student, D width of the teacher, H, W the student's map, N
queries, the teacher's tokens in raster order.

Reference:
    Fan et al., "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers", section 2.1;
    layers as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import LayerNorm2d
from torch import nn

from fkdpipe.common.errors import ModelError
from fkdpipe.train.methods import parts


@dataclass(frozen=True)
class Attention:
    """Of a CAP. heads: None takes one for 128 channels. softmax_scale: sharpens the softmax.

    layer_norm: in the stem, instead of batch norm.
    """

    heads: int | None
    softmax_scale: float
    layer_norm: bool


class Cap(nn.Module):
    """Cross-attention from the teacher's places to the student's map; no shortcut from the query.

    Args:
        shape: (C, H, W) of the student's map. width: D. grid: of the queries.
        own_query: learn the queries; False when they come with each batch.

    Raises:
        ModelError: heads that do not divide the width.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: int,
        grid: tuple[int, int],
        attention: Attention,
        *,
        own_query: bool,
    ) -> None:
        super().__init__()
        channels = shape[0]
        self.grid = grid
        self.heads = _heads(width, attention.heads)
        self.scale = attention.softmax_scale * (width // self.heads) ** -0.5
        norm = LayerNorm2d(channels) if attention.layer_norm else nn.BatchNorm2d(channels)
        self.stem = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), norm, nn.ReLU())
        self.places = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *shape), std=0.02))
        self.query = nn.Parameter(torch.randn(grid[0] * grid[1], width)) if own_query else None
        self.query_stem = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.to_q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(channels, width), nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, map_BCHW: torch.Tensor, query_BDHW: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, D, H', W') on the queries' grid.

        Args:
            query_BDHW: (B, D, H', W') queries, None takes the learnt ones.
        """
        memory = (self.stem(map_BCHW) + self.places).flatten(2).transpose(1, 2)
        if query_BDHW is not None:
            query = query_BDHW.flatten(2).transpose(1, 2)
        else:
            assert self.query is not None
            query = self.query.expand(len(map_BCHW), -1, -1)
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (self.to_q(self.query_stem(query)), self.to_k(memory), self.to_v(memory))
        )
        made = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        made = self.norm(self.out(made.transpose(1, 2).flatten(2)))
        made = made + self.ffn(made)
        return made.transpose(1, 2).unflatten(2, self.grid)


class Plain(nn.Module):
    """A linear layer on each place, or two 3 x 3 convolutions; then the teacher's grid."""

    def __init__(self, channels: int, width: int, grid: tuple[int, int], *, conv: bool) -> None:
        super().__init__()
        self.grid = grid
        self.layers: nn.Module = nn.Conv2d(channels, width, 1)
        if conv:
            self.layers = nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )

    def forward(
        self, map_BCHW: torch.Tensor, query_BDHW: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, D, H', W'); there are no queries here."""
        return parts.on_grid(self.layers(map_BCHW), self.grid)


def _heads(width: int, heads: int | None) -> int:
    """The released Swin-S settings have 3 heads at 384 channels and 6 at 768: one for 128."""
    if heads is None:
        return next(n for n in range(max(width // 128, 1), 0, -1) if width % n == 0)
    if width % heads:
        near = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
        raise ModelError(f"ScaleKD: {heads} heads do not divide {width} channels; {near} would.")
    return heads
