"""Mixup and CutMix, independent of the number of processes.

Partners come from a permutation seeded by (seed, step, block): the step's images are divided into
blocks that stay in one process, and within a block every image is mixed with another one, never
with itself. (Rolling the batch by one, as libraries do, pairs neighbouring crops of one image and
depends on the batch layout.) Each block has one coefficient.

References:
    Zhang et al., "mixup: Beyond Empirical Risk Minimization", equation 1.
    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers", equations 1 and 2.

Letters: B crops (I images, m of each, image-major), C classes, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fkdpipe.pixels import crops
from fkdpipe.train.settings import MixingSettings


@dataclass(frozen=True)
class Mix:
    """Partners and coefficients of a batch.

    Attributes:
        partner_B: int64, row of the partner in the same batch. own_B: float32, lambda.
        box_B4: float32 (top, left, bottom, right) of the CutMix patch as fractions of the image;
            NaN for mixup.
    """

    partner_B: torch.Tensor
    own_B: torch.Tensor
    box_B4: torch.Tensor

    def to(self, device: torch.device) -> Mix:
        return Mix(self.partner_B.to(device), self.own_B.to(device), self.box_B4.to(device))


def draw(
    settings: MixingSettings, *, seed: int, step: int, first_image: int, images: int, m: int
) -> Mix:
    """The mix of one process's share of a step.

    Args:
        first_image: position of its first image in the step, a multiple of the block size.
    """
    partner_Im = np.empty((images, m), dtype=np.int64)
    own_I = np.empty(images, dtype=np.float32)
    box_I4 = np.full((images, 4), np.nan, dtype=np.float32)
    step_seed = crops.derive_seed(seed, step)
    for begin in range(0, images, settings.block):
        end = min(begin + settings.block, images)
        number = (first_image + begin) // settings.block
        random = np.random.default_rng(crops.derive_seed(step_seed, number))
        order = begin + random.permutation(end - begin)
        shift = int(random.integers(m))
        partner_Im[order] = np.roll(order, -1)[:, None] * m + (np.arange(m) + shift) % m
        own, box = _coefficient(settings, random)
        own_I[begin:end], box_I4[begin:end] = own, box
        if end - begin == 1:  # no partner
            own_I[begin:end], box_I4[begin:end] = 1.0, np.nan
    return Mix(
        torch.from_numpy(partner_Im.ravel()),
        torch.from_numpy(np.repeat(own_I, m)),
        torch.from_numpy(np.repeat(box_I4, m, axis=0)),
    )


def _coefficient(
    settings: MixingSettings, random: np.random.Generator
) -> tuple[float, tuple[float, ...]]:
    """(lambda, patch) of one block."""
    nothing = (np.nan,) * 4
    mixed, cut = random.random() < settings.probability, random.random() < settings.switch
    cut = bool(settings.cutmix) and (cut or not settings.mixup)
    alpha = settings.cutmix if cut else settings.mixup
    own = float(random.beta(alpha, alpha)) if alpha else 1.0
    centre_y, centre_x = random.random(2)
    if not mixed:
        return 1.0, nothing
    if not cut:
        return own, nothing
    half = 0.5 * np.sqrt(1.0 - own)
    return own, (centre_y - half, centre_x - half, centre_y + half, centre_x + half)


def own_share(mix: Mix, size: tuple[int, int]) -> torch.Tensor:
    """float32 (B, 1, H, W): weight of the image itself at each pixel; 0 or 1 for CutMix."""
    height, width = size
    top, left, bottom, right = _pixels(mix, size)
    device = mix.own_B.device
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    inside_y = (y[None] >= top[:, None]) & (y[None] < bottom[:, None])
    inside_x = (x[None] >= left[:, None]) & (x[None] < right[:, None])
    patch = inside_y[:, :, None] & inside_x[:, None, :]
    whole = mix.box_B4[:, 0].isnan()[:, None, None]
    return torch.where(whole, mix.own_B[:, None, None], (~patch).float())[:, None]


def _pixels(mix: Mix, size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """The patches in whole pixels, clipped at the border."""
    top, left, bottom, right = mix.box_B4.nan_to_num(0.0).unbind(1)
    height, width = size
    rows = [(v * height).trunc().clamp(0, height) for v in (top, bottom)]
    columns = [(v * width).trunc().clamp(0, width) for v in (left, right)]
    return rows[0], columns[0], rows[1], columns[1]


def mix_pixels(mix: Mix, pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """lambda x_i + (1 - lambda) x_j for mixup; x_i with a patch of x_j for CutMix."""
    share = own_share(mix, tuple(pixels_B3HW.shape[2:]))  # type: ignore[arg-type]
    share = share.to(pixels_B3HW.dtype)
    return pixels_B3HW * share + pixels_B3HW[mix.partner_B] * (1 - share)


def mix_targets(mix: Mix, prob_BC: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """lambda y_i + (1 - lambda) y_j; for CutMix, lambda is the fraction of pixels kept.

    Args:
        size: (height, width) of the student's input, which determines the rounding of the patch.
    """
    share_B1 = own_share(mix, size).mean(dim=(2, 3))
    return prob_BC * share_B1 + prob_BC[mix.partner_B] * (1 - share_B1)
