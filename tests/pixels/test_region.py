"""Region decoding: the pixels of a full decode and a slice, the failures of a full decode."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fkdpipe.pixels.replay import Request, View, cpu, open_replay
from fkdpipe.pixels.replay.region import decode_region

HEIGHT, WIDTH = 91, 133  # no multiples of a block
ROTATED = Image.Exif()
ROTATED[0x0112] = 6

JPEGS = {
    "4:2:0": {"subsampling": "4:2:0", "quality": 90},
    "4:2:2": {"subsampling": "4:2:2", "quality": 75},
    "4:4:4": {"subsampling": "4:4:4", "quality": 95},
    "progressive": {"progressive": True, "subsampling": "4:2:0"},
    "restart markers": {"restart_marker_rows": 1},
    "exif": {"exif": ROTATED},
    "gray": {"mode": "L"},
}
OTHERS = {
    "cmyk": {"mode": "CMYK"},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "quality": 80},
    "palette png": {"format": "PNG", "mode": "P"},
}


@pytest.fixture
def encode(cut):
    def make(format="JPEG", mode="RGB", **options) -> bytes:
        buffer = io.BytesIO()
        cut(5, HEIGHT, WIDTH).convert(mode).save(buffer, format, **options)
        return buffer.getvalue()

    return make


def some_boxes(count: int) -> list[tuple[int, int, int, int]]:
    """Random boxes, single pixels and the whole image among them."""
    random = np.random.default_rng(3)
    boxes = [(0, 0, HEIGHT, WIDTH), (0, 0, 1, 1), (HEIGHT - 1, WIDTH - 1, 1, 1)]
    for _ in range(count):
        h, w = int(random.integers(1, HEIGHT + 1)), int(random.integers(1, WIDTH + 1))
        top, left = random.integers(HEIGHT - h + 1), random.integers(WIDTH - w + 1)
        boxes.append((int(top), int(left), h, w))
    return boxes


@pytest.mark.parametrize("kind", JPEGS)
def test_a_region_of_a_jpeg_is_a_slice_of_the_full_decode(encode, tmp_path, kind):
    encoded = encode(**JPEGS[kind])
    (tmp_path / "x").write_bytes(encoded)
    whole = cpu.decode(os.fsencode(tmp_path / "x"), (HEIGHT, WIDTH))
    assert isinstance(whole, torch.Tensor)
    for top, left, height, width in some_boxes(40):
        box = (top, left, height, width)
        region = decode_region(np.frombuffer(encoded, np.uint8), box, (HEIGHT, WIDTH))
        assert region is not None
        assert torch.equal(region, whole[:, top : top + height, left : left + width])


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_left_to_the_full_decode(encode, kind):
    encoded = np.frombuffer(encode(**OTHERS[kind]), np.uint8)
    assert decode_region(encoded, (0, 0, 5, 5), (HEIGHT, WIDTH)) is None


def request_of(path, boxes) -> Request:
    return Request(
        paths=[os.fsencode(path)] * len(boxes),
        size_I2=np.array([[HEIGHT, WIDTH]] * len(boxes)),
        box_Im4=np.array(boxes, dtype=np.uint16)[:, None],
        flip_Im=np.zeros((len(boxes), 1), dtype=bool),
    )


def replayed(request: Request):
    with open_replay("cpu", [View((32, 32))]) as replayer:
        (pixels,) = replayer.run([request])
    return pixels.views[0].clone(), [(f.image, f.code, f.detail) for f in pixels.failures]


@pytest.mark.parametrize("kind", [*JPEGS, *OTHERS])
def test_single_crops_are_the_same_with_and_without_region_decoding(
    encode, tmp_path, monkeypatch, kind
):
    (tmp_path / "x").write_bytes(encode(**{**JPEGS, **OTHERS}[kind]))
    request = request_of(tmp_path / "x", some_boxes(12))
    pixels, failures = replayed(request)
    monkeypatch.setattr(cpu, "decode_region", None)
    plainly, plain_failures = replayed(request)
    assert not failures
    assert not plain_failures
    assert torch.equal(pixels, plainly)


@pytest.mark.parametrize("damage", ["half", "tail", "header", "empty", "missing", "resized", "gif",
                                    "16-bit", "text"])  # fmt: skip
def test_failures_are_the_same_with_and_without_region_decoding(
    encode, tmp_path, monkeypatch, capfd, damage
):
    """Although the box lies in the upper rows, which a cut file still has."""
    good, file = encode(), tmp_path / "x"
    written = {
        "half": good[: len(good) // 2],
        "tail": good[:-20],
        "header": good[:30],
        "empty": b"",
        "gif": encode("GIF"),
        "text": b"\xff\xd8\xff not a picture \xff\xd9",
    }
    if damage in written:
        file.write_bytes(written[damage])
    elif damage == "resized":
        Image.new("RGB", (20, 30)).save(file, "JPEG")
    elif damage == "16-bit":
        Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype=np.uint16)).save(file, "PNG")
    request = request_of(file, [(0, 0, 8, 8), (2, 3, 10, 20)])
    pixels, failures = replayed(request)
    monkeypatch.setattr(cpu, "decode_region", None)
    plainly, plain_failures = replayed(request)
    assert failures == plain_failures
    assert torch.equal(pixels, plainly)
    assert len(failures) == (0 if damage == "gif" else 2)
    assert damage == "gif" or not pixels.any()
    capfd.readouterr()  # decoders print on stderr by themselves
