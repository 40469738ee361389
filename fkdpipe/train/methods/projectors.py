"""ScaleKD's projectors, which map a student's map to the teacher's width and grid.

In the cross-attention projector (CAP), a grid of queries attends to the student's map; table 9b
compares it with a linear and a convolutional projector.

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
    """Attention settings of a CAP.

    Attributes:
        heads: None uses one per 128 channels. softmax_scale: factor on the attention scores.
        layer_norm: use layer norm in the stem instead of batch norm.
    """

    heads: int | None
    softmax_scale: float
    layer_norm: bool


class Cap(nn.Module):
    """Cross-attention from the teacher's positions to the student's map, without residual.

    Args:
        shape: (C, H, W) of the student's map. width: D. grid: of the queries.
        own_query: learn the queries; False if they are passed with each batch.

    Raises:
        ModelError: the number of heads does not divide the width.
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
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *shape), std=0.02))
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
            query_BDHW: (B, D, H', W') queries; None uses the learnt ones.
        """
        memory = (self.stem(map_BCHW) + self.positions).flatten(2).transpose(1, 2)
        if query_BDHW is not None:
            query = query_BDHW.flatten(2).transpose(1, 2)
        else:
            assert self.query is not None
            query = self.query.expand(len(map_BCHW), -1, -1)
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (self.to_q(self.query_stem(query)), self.to_k(memory), self.to_v(memory))
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        out = self.norm(self.out(out.transpose(1, 2).flatten(2)))
        out = out + self.ffn(out)
        return out.transpose(1, 2).unflatten(2, self.grid)


class Plain(nn.Module):
    """A linear layer per position, or two 3 x 3 convolutions, resized to the teacher's grid."""

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
        """(B, D, H', W'); queries are ignored."""
        return parts.on_grid(self.layers(map_BCHW), self.grid)


def _heads(width: int, heads: int | None) -> int:
    """The authors' Swin-S settings use 3 heads for 384 channels and 6 for 768: one per 128."""
    if heads is None:
        return next(n for n in range(max(width // 128, 1), 0, -1) if width % n == 0)
    if width % heads:
        near = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
        raise ModelError(f"ScaleKD: {heads} heads do not divide {width} channels; use {near}.")
    return heads
