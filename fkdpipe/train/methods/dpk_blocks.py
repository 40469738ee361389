"""DPK's transforms, which predict the teacher's map from the maps of both networks.

Letters: B batch, N tokens, M masked tokens, D width, C channels, H, W map, k side of a patch.

Reference:
    Zong et al., "Better Teacher Better Student: Dynamic Prior Knowledge for Knowledge
    Distillation", section 2.2, appendix A.2 and tables 7 and 8; sizes as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fkdpipe.common.errors import ModelError

Transform = Literal["encoder-decoder", "mlp", "conv"]
Fill = Literal["teacher", "zero", "learnable"]
Positions = Literal["sincos", "learnable"]


@dataclass(frozen=True)
class Side:
    """One network's map. patch: k, the side of a token in map positions."""

    channels: int
    patch: int


@dataclass(frozen=True)
class Stack:
    """A stack of transformer blocks."""

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 2:
            raise ModelError(
                f"DPK: width {self.width} is not an even multiple of {self.heads} heads; the "
                f"nearest is {max(round(self.width / (2 * self.heads)), 1) * 2 * self.heads}."
            )


class Block(nn.Module):
    """Pre-norm transformer block with residual connections; keys have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        x_BND = x_BND + self._attend(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))

    def _attend(self, x_BND: torch.Tensor) -> torch.Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = nn.functional.linear(x_BND, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


def blocks(stack: Stack) -> nn.Sequential:
    """The blocks of the stack, followed by a LayerNorm."""
    layers: list[nn.Module] = [Block(stack.width, stack.heads) for _ in range(stack.depth)]
    return nn.Sequential(*layers, nn.LayerNorm(stack.width, eps=1e-6))


def position_embedding(tokens: int, width: int) -> torch.Tensor:
    """float32 (N, D): sin(n / 10000^(2 floor(j/2) / D)) at even j, the cosine at odd j."""
    j = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None]
    angle = angle / 10_000 ** (2 * (j // 2) / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


def patchify(map_BCHW: torch.Tensor, k: int) -> torch.Tensor:
    """(B, N, k k C): each token holds k x k positions of the map, channels fastest."""
    cut = map_BCHW.unflatten(3, (-1, k)).unflatten(2, (-1, k))  # b c h k w k'
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class Attentive(nn.Module):
    """`encoder-decoder`: transformer blocks; each encoder sees only the tokens that it provides.

    Without the teacher's prior knowledge (table 7) there is no teacher encoder: zeros or one
    learnable token replace its output.
    """

    encoder_positions: torch.Tensor
    decoder_positions: torch.Tensor

    def __init__(
        self,
        student: Side,
        teacher: Side,
        tokens: int,
        encoder: Stack,
        decoder: Stack,
        fill: Fill,
        positions: Positions = "sincos",
    ) -> None:
        super().__init__()
        self.fill = fill
        self.student_patches = _patches(student, encoder.width)
        self.student_encoder = blocks(encoder)
        if fill == "teacher":
            self.teacher_patches = _patches(teacher, encoder.width)
            self.teacher_encoder = blocks(encoder)
        self.token = _token(decoder.width) if fill == "learnable" else None
        self.to_decoder = nn.Linear(encoder.width, decoder.width, bias=False)
        self.decoder = blocks(decoder)
        self.out = _out(decoder.width, teacher)
        for name, stack in (("encoder_positions", encoder), ("decoder_positions", decoder)):
            _add_positions(self, name, position_embedding(tokens, stack.width), positions)

    def forward(
        self, student_BCHW: torch.Tensor, teacher_BCHW: torch.Tensor, mask_BN: torch.Tensor, m: int
    ) -> torch.Tensor:
        """(B, N, k k C_t) prediction of the teacher's map.

        Args:
            mask_BN: True for tokens from the teacher. m: M, their number in each row.
        """
        order_BN = mask_BN.int().argsort(dim=1, stable=True)
        student_index, teacher_index = (
            order_BN[:, : order_BN.shape[1] - m],
            order_BN[:, order_BN.shape[1] - m :],
        )
        kept = self.student_encoder(
            _pick(self._tokens(self.student_patches, student_BCHW), student_index)
        )
        kept = self.to_decoder(kept)
        if self.fill == "teacher":
            visible = _pick(self._tokens(self.teacher_patches, teacher_BCHW), teacher_index)
            filled = self.to_decoder(self.teacher_encoder(visible))
        else:
            filled = _filled(self.token, kept, m)
        hybrid = torch.cat([kept, filled.to(kept.dtype)], dim=1)
        hybrid = _pick(hybrid, order_BN.argsort(dim=1)) + self.decoder_positions
        return self.out(self.decoder(hybrid))

    def _tokens(self, patches: nn.Module, map_BCHW: torch.Tensor) -> torch.Tensor:
        return patches(map_BCHW).flatten(2).transpose(1, 2) + self.encoder_positions


class Pointwise(nn.Module):
    """`mlp`: an MLP per token instead of the encoders (MLP-Decoder)."""

    positions: torch.Tensor

    def __init__(
        self,
        student: Side,
        teacher: Side,
        tokens: int,
        decoder: Stack,
        fill: Fill,
        positions: Positions = "sincos",
    ) -> None:
        super().__init__()
        self.student_mlp = _mlp(student, decoder.width)
        self.teacher_mlp = _mlp(teacher, decoder.width) if fill == "teacher" else None
        self.token = _token(decoder.width) if fill == "learnable" else None
        self.decoder = blocks(decoder)
        self.out = _out(decoder.width, teacher)
        _add_positions(self, "positions", position_embedding(tokens, decoder.width), positions)

    def forward(
        self, student_BCHW: torch.Tensor, teacher_BCHW: torch.Tensor, mask_BN: torch.Tensor, m: int
    ) -> torch.Tensor:
        """As `Attentive.forward`."""
        kept = self.student_mlp(student_BCHW).flatten(2).transpose(1, 2)
        if self.teacher_mlp is not None:
            filled = self.teacher_mlp(teacher_BCHW).flatten(2).transpose(1, 2)
        else:
            filled = _filled(self.token, kept, kept.shape[1])
        hybrid = torch.where(mask_BN[:, :, None], filled, kept) + self.positions
        return self.out(self.decoder(hybrid))


class Convolutional(nn.Module):
    """`conv`: two 3 x 3 convolutions for each encoder and for the decoder.

    The paper does not give the sizes; these are ours. Kernels cross the edge of the mask, so a
    token also depends on its masked neighbours.
    """

    def __init__(self, student: Side, teacher: Side, width: int, fill: Fill) -> None:
        super().__init__()
        self.student_encoder = _convolutions(_patches(student, width), width)
        self.teacher_encoder = None
        if fill == "teacher":
            self.teacher_encoder = _convolutions(_patches(teacher, width), width)
        self.token = _token(width) if fill == "learnable" else None
        self.decoder = _convolutions(nn.Identity(), width)
        self.out = _out(width, teacher)

    def forward(
        self, student_BCHW: torch.Tensor, teacher_BCHW: torch.Tensor, mask_BN: torch.Tensor, m: int
    ) -> torch.Tensor:
        """As `Attentive.forward`."""
        kept = self.student_encoder(student_BCHW)
        grid = kept.shape[2:]
        if self.teacher_encoder is not None:
            filled = self.teacher_encoder(teacher_BCHW)
        else:
            tokens = _filled(self.token, kept.flatten(2).transpose(1, 2), grid.numel())
            filled = tokens.transpose(1, 2).unflatten(2, grid)
        hybrid = torch.where(mask_BN.unflatten(1, grid)[:, None], filled, kept)
        return self.out(self.decoder(hybrid).flatten(2).transpose(1, 2))


def _add_positions(
    module: nn.Module, name: str, start_ND: torch.Tensor, positions: Positions
) -> None:
    if positions == "learnable":
        module.register_parameter(name, nn.Parameter(start_ND))
    else:
        module.register_buffer(name, start_ND, persistent=False)


def _patches(side: Side, width: int) -> nn.Conv2d:
    return nn.Conv2d(side.channels, width, side.patch, stride=side.patch)


def _mlp(side: Side, width: int) -> nn.Sequential:
    return nn.Sequential(_patches(side, width), nn.GELU(), nn.Conv2d(width, width, 1))


def _convolutions(first: nn.Module, width: int) -> nn.Sequential:
    layers = [first]
    for _ in range(2):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def _out(width: int, teacher: Side) -> nn.Linear:
    layer = nn.Linear(width, teacher.channels * teacher.patch**2)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _token(width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))


def _filled(token: torch.Tensor | None, like_BND: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, tokens, D): zeros, or copies of the learnable token."""
    if token is None:
        return like_BND.new_zeros(len(like_BND), tokens, like_BND.shape[2])
    return token.to(like_BND.dtype).expand(len(like_BND), tokens, -1)


def _pick(x_BND: torch.Tensor, index_BM: torch.Tensor) -> torch.Tensor:
    """(B, M, D): the tokens at M positions, which differ between rows."""
    return x_BND.gather(1, index_BM[:, :, None].expand(-1, -1, x_BND.shape[2]))
