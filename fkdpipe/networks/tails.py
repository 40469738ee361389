"""The last layers of a frozen transformer, for ScaleKD's proxy path.

Gradients flow to the input, not to the weights, which are frozen with the teacher. A tail is not a
module, so its owner neither trains nor saves the teacher's weights.

Letters: B batch, C channels, H, W map.

Reference:
    Fan et al., "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers", section 2.3
    (teacher parameter perception).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fkdpipe.common.errors import ModelError


@dataclass(frozen=True)
class Tail:
    """Maps (B, C, H, W) of an earlier stage to (B, C', H', W') of the last, after the final norm.

    Attributes:
        channels: C, of the input. stride: H / H'.
    """

    network: Any
    channels: int
    stride: int
    run: Callable[[Any, torch.Tensor], torch.Tensor]

    def __call__(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        return self.run(self.network, map_BCHW)


def of(network: Any, blocks: int) -> Tail:
    """The tail of a teacher: a Swin's last stage, or the last `blocks` of a plain transformer.

    A plain transformer gets tokens without class token. BEiT's relative positions include one, so
    its learnt class token is prepended.

    Raises:
        ModelError: unsupported family of networks, or too few blocks.
    """
    kind = type(network).__name__
    if kind in ("SwinTransformer", "SwinTransformerV2"):
        before, last = network.feature_info[-2:]
        stride = int(last["reduction"]) // int(before["reduction"])
        return Tail(network, int(before["num_chs"]), stride, _swin)
    if kind not in ("VisionTransformer", "VisionTransformerDistilled", "Beit"):
        raise ModelError(
            f"unknown tail for {kind}. Set tpp = false, or use a Swin (V1, V2), plain ViT, DeiT or "
            "BEiT teacher.",
            code="no-tail",
        )
    if not 1 <= blocks < len(network.blocks):
        raise ModelError(
            f"{kind} has {len(network.blocks)} blocks; a tail of {blocks} was requested."
        )

    def run(network: Any, map_BCHW: torch.Tensor) -> torch.Tensor:
        run_blocks = _beit if kind == "Beit" else _vit
        tokens = run_blocks(network, map_BCHW.flatten(2).transpose(1, 2), blocks)
        return tokens.transpose(1, 2).unflatten(2, map_BCHW.shape[2:])

    return Tail(network, int(network.embed_dim), 1, run)


def _swin(network: Any, map_BCHW: torch.Tensor) -> torch.Tensor:
    """timm's stages begin with the patch merging, so the last stage is enough."""
    map_BHWC = network.norm(network.layers[-1](map_BCHW.permute(0, 2, 3, 1)))
    return map_BHWC.permute(0, 3, 1, 2)


def _vit(network: Any, tokens_BNC: torch.Tensor, blocks: int) -> torch.Tensor:
    for block in network.blocks[-blocks:]:
        tokens_BNC = block(tokens_BNC)
    return network.norm(tokens_BNC)


def _beit(network: Any, tokens_BNC: torch.Tensor, blocks: int) -> torch.Tensor:
    first = network.cls_token.expand(len(tokens_BNC), -1, -1).to(tokens_BNC.dtype)
    tokens_BNC = torch.cat([first, tokens_BNC], dim=1)
    shared = network.rel_pos_bias() if network.rel_pos_bias is not None else None
    for block in network.blocks[-blocks:]:
        tokens_BNC = block(tokens_BNC, shared_rel_pos_bias=shared)
    return network.norm(tokens_BNC)[:, 1:]
