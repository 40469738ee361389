"""Recorded colour jitter, applied with torch on the device after replay, in both phases.

The factors of a crop are part of its record (`crops.Jitter`), so the student sees the same colours
as the teacher. The operations are those of torchvision's ColorJitter, always in the order
brightness, contrast, saturation, hue (torchvision draws a random order). They are computed in
float32 on levels 0 to 255, clamped after each operation and rounded to uint8 once, at the end.

The result does not depend on the batch: every step is elementwise, and the mean that contrast needs
is a sum of integers.
"""

from __future__ import annotations

import torch

_GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
_FINE = 256  # steps of a grey level in the sum that contrast needs


def jitter(pixels_B3HW: torch.Tensor, factor_B4: torch.Tensor | None) -> torch.Tensor:
    """Change colours as recorded; returns uint8 pixels of the same shape and memory format.

    Args:
        pixels_B3HW: uint8, on any device.
        factor_B4: float32 brightness, contrast, saturation (1 changes nothing) and hue (in turns
            of the colour wheel, 0 changes nothing); None returns the pixels unchanged.
    """
    if factor_B4 is None:
        return pixels_B3HW
    factor = factor_B4.to(pixels_B3HW.device, non_blocking=True)
    brightness, contrast, saturation, hue = (f.view(-1, 1, 1, 1) for f in factor.unbind(1))
    x = pixels_B3HW.to(torch.float32).mul_(brightness).clamp_(0, 255)
    x = _blend(x, _mean(_gray(x)), contrast)
    x = _blend(x, _gray(x), saturation)
    if bool((factor_B4[:, 3] != 0).any()):
        x = torch.where(hue == 0, x, _turn(x, hue))
    return x.round_().to(torch.uint8)


def _blend(x: torch.Tensor, other: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """share * x + (1 - share) * other, and exactly x where the share is 1."""
    return (x * share).add_(other * (1 - share)).clamp_(0, 255)


def _gray(x_B3HW: torch.Tensor) -> torch.Tensor:
    """float32 (B, 1, H, W)."""
    red, green, blue = x_B3HW.unbind(1)
    return ((red * _GRAY[0]).add_(green * _GRAY[1]).add_(blue * _GRAY[2])).unsqueeze(1)


def _mean(gray_B1HW: torch.Tensor) -> torch.Tensor:
    """float32 (B, 1, 1, 1), the same in any batch: sums of integers do not depend on the order."""
    levels = gray_B1HW.mul(_FINE).round_().to(torch.int64).sum(dim=(1, 2, 3), keepdim=True)
    count = _FINE * gray_B1HW.shape[2] * gray_B1HW.shape[3]
    return (levels.to(torch.float64) / count).to(torch.float32)


def _turn(x_B3HW: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate hues; value and saturation of HSV do not change.

    The hexagon formula of HSV (Smith 1978), one colour channel at a time: channel n (5, 3, 1 for
    red, green, blue) is v - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + 6 hue) mod 6.
    """
    value, chroma = x_B3HW.amax(1), x_B3HW.amax(1) - x_B3HW.amin(1)
    red, green, blue = x_B3HW.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixths = sixths + 6 * turns[:, 0]
    channels = []
    for n in (5, 3, 1):
        k = (sixths + n).remainder_(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1).clamp_(0, 255)
