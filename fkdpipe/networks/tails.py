"""The end of a frozen transformer as a function of an earlier map: what ScaleKD's proxy path runs.

Gradients go through it to its input, and none to its weights, which are frozen with their teacher.
A tail is no module: whoever holds one neither trains nor saves the teacher in it.

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
    """(B, C, H, W) of an earlier stage to (B, C', H', W') of the last one, after the final norm.

    Attributes:
        channels: C, of what goes in. stride: H / H'.
    """

    network: Any
    channels: int
    stride: int
    run: Callable[[Any, torch.Tensor], torch.Tensor]

    def __call__(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        return self.run(self.network, map_BCHW)


def of(network: Any, blocks: int) -> Tail:
    """The tail of a teacher: a Swin's last stage, or the last `blocks` of a plain transformer.

    A plain transformer's tokens go in without class token; a BEiT's relative positions count one,
    so its learnt one is put before them.

    Raises:
        ModelError: another family of networks, or fewer blocks than asked for.
    """
    kind = type(network).__name__
    if kind in ("SwinTransformer", "SwinTransformerV2"):
        before, last = network.feature_info[-2:]
        stride = int(last["reduction"]) // int(before["reduction"])
        return Tail(network, int(before["num_chs"]), stride, _swin)
    if kind not in ("VisionTransformer", "VisionTransformerDistilled", "Beit"):
        raise ModelError(
            f"a {kind} teacher has no tail that is known here: Swin (V1, V2), plain ViT, DeiT and "
            "BEiT have. Set tpp = false, or take one of those.",
            code="no-tail",
        )
    if not 1 <= blocks < len(network.blocks):
        raise ModelError(
            f"{kind} has {len(network.blocks)} blocks; a tail of {blocks} is asked for."
        )

    def run(network: Any, map_BCHW: torch.Tensor) -> torch.Tensor:
        through = _beit if kind == "Beit" else _vit
        tokens = through(network, map_BCHW.flatten(2).transpose(1, 2), blocks)
        return tokens.transpose(1, 2).unflatten(2, map_BCHW.shape[2:])

    return Tail(network, int(network.embed_dim), 1, run)


def _swin(network: Any, map_BCHW: torch.Tensor) -> torch.Tensor:
    """timm merges patches at the beginning of a stage, so the stage alone is enough."""
    made = network.norm(network.layers[-1](map_BCHW.permute(0, 2, 3, 1)))
    return made.permute(0, 3, 1, 2)


def _vit(network: Any, tokens_BNC: torch.Tensor, blocks: int) -> torch.Tensor:
    for block in network.blocks[-blocks:]:
        tokens_BNC = block(tokens_BNC)
    return network.norm(tokens_BNC)


def _beit(network: Any, tokens_BNC: torch.Tensor, blocks: int) -> torch.Tensor:
    first = network.cls_token.expand(len(tokens_BNC), -1, -1).to(tokens_BNC.dtype)
    made = torch.cat([first, tokens_BNC], dim=1)
    shared = network.rel_pos_bias() if network.rel_pos_bias is not None else None
    for block in network.blocks[-blocks:]:
        made = block(made, shared_rel_pos_bias=shared)
    return network.norm(made)[:, 1:]
