"""Decode only the part of a JPEG that a single crop needs.

This uses nvImageCodec on the CPU, which needs no GPU. It has the same libjpeg-turbo as the other
decoders here, and skips the inverse transform and the colour conversion outside the region. The
pixels are bit-identical to a full decode and a slice; about a fifth of the decoding time is saved.

Anything unusual about a file (another format, another size than recorded, no end marker, four
components, which nvImageCodec converts to RGB in another way, or a decoder that refuses it) is left
to the full decode, which also writes the error message: a missing, truncated or resized file fails
in the same way with both. Only damage in the middle of a scan,
below the region, goes unnoticed; the region's pixels are still correct.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from nvidia import nvimgcodec

_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_PARAMS = nvimgcodec.DecodeParams(
    apply_exif_orientation=False,
    color_spec=nvimgcodec.ColorSpec.SRGB,
    sample_format=nvimgcodec.SampleFormat.I_RGB,
)
_here = threading.local()  # a decoder works for one thread at a time


def decode_region(
    encoded: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]
) -> torch.Tensor | None:
    """uint8 (3, height, width) of a box in channels-last memory, or None: decode the whole image.

    Args:
        encoded: uint8, the file.
        box: (top, left, height, width) in pixels, EXIF orientation not applied.
        size: recorded (height, width) of the decoded image.
    """
    if encoded[:3].tobytes() != _START or encoded[-2:].tobytes() != _END:
        return None
    top, left, height, width = box
    try:
        stream = nvimgcodec.CodeStream(encoded)
        if (stream.height, stream.width) != size or stream.num_channels == 4:
            return None
        region = nvimgcodec.Region(top, left, top + height, left + width)
        image = _decoder().decode(stream.get_sub_code_stream(region=region), params=_PARAMS)
    except RuntimeError:
        return None
    if image is None:
        return None
    pixels = torch.from_numpy(np.asarray(image))
    return pixels.permute(2, 0, 1)


def _decoder() -> nvimgcodec.Decoder:
    """This thread's decoder, which runs in the calling thread."""
    if not hasattr(_here, "decoder"):
        _here.decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        )
    return _here.decoder
