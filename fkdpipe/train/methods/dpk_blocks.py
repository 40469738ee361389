"""DPK's transforms: from both networks' maps to a guess of the teacher's map.

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
Places = Literal["sincos", "learnable"]


@dataclass(frozen=True)
class Side:
    """One network's map. patch: k, the side of a token in places of the map."""

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
                f"DPK: width {self.width} is no even multiple of {self.heads} heads; the nearest "
                f"is {max(round(self.width / (2 * self.heads)), 1) * 2 * self.heads}."
            )


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and around a shortcut; no bias on the keys."""

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
        made = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(made.transpose(1, 2).flatten(2))


def blocks(stack: Stack) -> nn.Sequential:
    """The stack, and the LayerNorm that ends it."""
    made: list[nn.Module] = [Block(stack.width, stack.heads) for _ in range(stack.depth)]
    return nn.Sequential(*made, nn.LayerNorm(stack.width, eps=1e-6))


def positions(tokens: int, width: int) -> torch.Tensor:
    """float32 (N, D): sin(n / 10000^(2 floor(j/2) / D)) at even j, the cosine at odd j."""
    j = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None]
    angle = angle / 10_000 ** (2 * (j // 2) / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


def patchify(map_BCHW: torch.Tensor, k: int) -> torch.Tensor:
    """(B, N, k k C): k x k places of a map to a token, channels fastest."""
    cut = map_BCHW.unflatten(3, (-1, k)).unflatten(2, (-1, k))  # b c h k w k'
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class Attentive(nn.Module):
    """Encoder and decoder of transformer blocks; each encoder sees only the tokens it gives.

    Without the teacher's prior knowledge (table 7) there is no teacher encoder: zeros or one
    learnt token take its place.
    """

    encoder_places: torch.Tensor
    decoder_places: torch.Tensor

    def __init__(
        self,
        student: Side,
        teacher: Side,
        tokens: int,
        encoder: Stack,
        decoder: Stack,
        fill: Fill,
        places: Places = "sincos",
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
        for name, stack in (("encoder_places", encoder), ("decoder_places", decoder)):
            _add_places(self, name, positions(tokens, stack.width), places)

    def forward(
        self, student_BCHW: torch.Tensor, teacher_BCHW: torch.Tensor, mask_BN: torch.Tensor, m: int
    ) -> torch.Tensor:
        """(B, N, k k C_t) guess of the teacher's map.

        Args:
            mask_BN: true where the teacher gives the token. m: M, how many those are in each row.
        """
        order_BN = mask_BN.int().argsort(dim=1, stable=True)
        ours, theirs = order_BN[:, : order_BN.shape[1] - m], order_BN[:, order_BN.shape[1] - m :]
        kept = self.student_encoder(_pick(self._tokens(self.student_patches, student_BCHW), ours))
        kept = self.to_decoder(kept)
        if self.fill == "teacher":
            seen = _pick(self._tokens(self.teacher_patches, teacher_BCHW), theirs)
            given = self.to_decoder(self.teacher_encoder(seen))
        else:
            given = _filled(self.token, kept, m)
        hybrid = torch.cat([kept, given.to(kept.dtype)], dim=1)
        hybrid = _pick(hybrid, order_BN.argsort(dim=1)) + self.decoder_places
        return self.out(self.decoder(hybrid))

    def _tokens(self, patches: nn.Module, map_BCHW: torch.Tensor) -> torch.Tensor:
        return patches(map_BCHW).flatten(2).transpose(1, 2) + self.encoder_places


class Pointwise(nn.Module):
    """`mlp`: no encoders, an MLP brings each token to the decoder's width (MLP-Decoder)."""

    places: torch.Tensor

    def __init__(
        self,
        student: Side,
        teacher: Side,
        tokens: int,
        decoder: Stack,
        fill: Fill,
        places: Places = "sincos",
    ) -> None:
        super().__init__()
        self.student_mlp = _mlp(student, decoder.width)
        self.teacher_mlp = _mlp(teacher, decoder.width) if fill == "teacher" else None
        self.token = _token(decoder.width) if fill == "learnable" else None
        self.decoder = blocks(decoder)
        self.out = _out(decoder.width, teacher)
        _add_places(self, "places", positions(tokens, decoder.width), places)

    def forward(
        self, student_BCHW: torch.Tensor, teacher_BCHW: torch.Tensor, mask_BN: torch.Tensor, m: int
    ) -> torch.Tensor:
        """As `Attentive.forward`."""
        kept = self.student_mlp(student_BCHW).flatten(2).transpose(1, 2)
        if self.teacher_mlp is not None:
            given = self.teacher_mlp(teacher_BCHW).flatten(2).transpose(1, 2)
        else:
            given = _filled(self.token, kept, kept.shape[1])
        hybrid = torch.where(mask_BN[:, :, None], given, kept) + self.places
        return self.out(self.decoder(hybrid))


class Convolutional(nn.Module):
    """`conv`: two 3 x 3 convolutions as an encoder, two as the decoder.

    The paper names the kind only; the sizes are ours. A kernel reaches over the edge of the mask,
    so here a network's neighbours of a given token are seen too.
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
            given = self.teacher_encoder(teacher_BCHW)
        else:
            tokens = _filled(self.token, kept.flatten(2).transpose(1, 2), grid.numel())
            given = tokens.transpose(1, 2).unflatten(2, grid)
        hybrid = torch.where(mask_BN.unflatten(1, grid)[:, None], given, kept)
        return self.out(self.decoder(hybrid).flatten(2).transpose(1, 2))


def _add_places(module: nn.Module, name: str, start_ND: torch.Tensor, places: Places) -> None:
    if places == "learnable":
        module.register_parameter(name, nn.Parameter(start_ND))
    else:
        module.register_buffer(name, start_ND, persistent=False)


def _patches(side: Side, width: int) -> nn.Conv2d:
    return nn.Conv2d(side.channels, width, side.patch, stride=side.patch)


def _mlp(side: Side, width: int) -> nn.Sequential:
    return nn.Sequential(_patches(side, width), nn.GELU(), nn.Conv2d(width, width, 1))


def _convolutions(first: nn.Module, width: int) -> nn.Sequential:
    made = [first]
    for _ in range(2):
        made += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*made)


def _out(width: int, teacher: Side) -> nn.Linear:
    layer = nn.Linear(width, teacher.channels * teacher.patch**2)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _token(width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))


def _filled(token: torch.Tensor | None, like_BND: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, tokens, D) of zeros, or of the learnt token."""
    if token is None:
        return like_BND.new_zeros(len(like_BND), tokens, like_BND.shape[2])
    return token.to(like_BND.dtype).expand(len(like_BND), tokens, -1)


def _pick(x_BND: torch.Tensor, places_BM: torch.Tensor) -> torch.Tensor:
    """(B, M, D): tokens at some places, another choice in each row."""
    return x_BND.gather(1, places_BM[:, :, None].expand(-1, -1, x_BND.shape[2]))
