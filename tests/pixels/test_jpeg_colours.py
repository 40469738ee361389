"""JPEG colour spaces: every decoder gives the pixels of Pillow, whatever the markers say.

Decoders guess the colour space from JFIF and Adobe markers, the number of components and their ids.
The files are built by editing the markers of plain ones.
"""

from __future__ import annotations

import io
import itertools
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fkdpipe.pixels.replay import Request, View, cpu, open_replay
from fkdpipe.pixels.replay.region import decode_region

HEIGHT, WIDTH = 45, 61
JFIF, ADOBE, SCAN = 0xE0, 0xEE, 0xDA
MODES = {1: "L", 3: "RGB", 4: "CMYK"}
IDS = {
    1: [(1,), (7,)],
    3: [(1, 2, 3), (0, 1, 2), tuple(b"RGB"), (7, 8, 9)],
    4: [(1, 2, 3, 4), (0, 1, 2, 3), tuple(b"CMYK")],
}
VARIANTS = [
    (components, jfif, adobe, ids)
    for components in MODES
    for jfif, adobe, ids in itertools.product((False, True), (None, 0, 1, 2), IDS[components])
]


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def edit(jpeg: bytes, jfif: bool, adobe: int | None, ids: tuple[int, ...]) -> bytes:
    """The same scan with other JFIF and Adobe markers and other component ids."""
    head, at, old = b"\xff\xd8", 2, b""
    if jfif:
        head += segment(JFIF, b"JFIF\0\1\1\0\0\1\0\1\0\0")
    if adobe is not None:
        head += segment(ADOBE, b"Adobe\0\x64\0\0\0\0" + bytes([adobe]))
    while (marker := jpeg[at + 1]) != SCAN:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        payload = bytearray(jpeg[at + 4 : end])
        if marker in (0xC0, 0xC1, 0xC2):
            old = bytes(payload[6::3])
            payload[6::3] = bytes(ids)
        if marker not in (JFIF, ADOBE):
            head += segment(marker, bytes(payload))
        at = end
    scan = bytearray(jpeg[at:])
    for k in range(len(ids)):
        scan[5 + 2 * k] = ids[old.index(scan[5 + 2 * k])]
    return head + bytes(scan)


def encoded(components: int, jfif: bool, adobe: int | None, ids: tuple[int, ...]) -> bytes:
    """A smooth picture in all its channels, black included."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, components), dtype=np.uint8)
    picture = Image.fromarray(noise.squeeze(), MODES[components]).resize((WIDTH, HEIGHT))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, subsampling=0)
    return edit(buffer.getvalue(), jfif, adobe, ids)


def replayed(backend: str, path: bytes, m: int) -> torch.Tensor:
    request = Request(
        paths=[path],
        size_I2=np.array([[HEIGHT, WIDTH]]),
        box_Im4=np.array([[[0, 0, HEIGHT, WIDTH]] * m], dtype=np.uint16),
        flip_Im=np.zeros((1, m), dtype=bool),
    )
    with open_replay(backend, [View((HEIGHT, WIDTH))]) as replayer:
        (pixels,) = replayer.run([request])
    assert not pixels.failures
    return pixels.views[0][-1].clone()


@pytest.mark.parametrize(("components", "jfif", "adobe", "ids"), VARIANTS)
def test_every_decoder_gives_the_colours_of_pillow(components, jfif, adobe, ids, tmp_path, capfd):
    path = os.fsencode(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(encoded(components, jfif, adobe, ids))
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.mode == MODES[components]
        pillow = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert pillow.float().std() > 20  # a picture, not one colour
    assert torch.equal(cpu.decode(path, (HEIGHT, WIDTH)), pillow)
    for backend, m in itertools.product(("cpu", "dali"), (1, 2)):
        assert torch.equal(replayed(backend, path, m), pillow), (backend, m)
    capfd.readouterr()  # decoders print on stderr by themselves


@pytest.mark.parametrize(("components", "jfif", "adobe", "ids"), VARIANTS)
def test_a_region_is_a_slice_or_left_to_the_full_decode(
    components, jfif, adobe, ids, tmp_path, capfd
):
    (tmp_path / "x.jpg").write_bytes(encoded(components, jfif, adobe, ids))
    whole = cpu.decode(os.fsencode(tmp_path / "x.jpg"), (HEIGHT, WIDTH))
    file = np.fromfile(tmp_path / "x.jpg", np.uint8)
    region = decode_region(file, (3, 5, 20, 31), (HEIGHT, WIDTH))
    assert (region is None) == (components == 4)
    assert region is None or torch.equal(region, whole[:, 3:23, 5:36])
    capfd.readouterr()


@pytest.mark.parametrize("adobe", [None, 2])
def test_crops_of_cmyk_are_the_same_in_both_replays_among_others(adobe, tmp_path, cut):
    """In a batch with other images, and beside an image of another size than recorded."""
    (tmp_path / "cmyk.jpg").write_bytes(encoded(4, False, adobe, (1, 2, 3, 4)))
    cut(1, HEIGHT, WIDTH).save(tmp_path / "plain.jpg")
    cut(2, 20, 30).save(tmp_path / "small.jpg")
    names = ("plain.jpg", "cmyk.jpg", "small.jpg")
    boxes = [[0, 0, HEIGHT, WIDTH], [4, 9, 30, 25], [11, 2, 17, 50]]
    request = Request(
        paths=[os.fsencode(tmp_path / name) for name in names],
        size_I2=np.array([[HEIGHT, WIDTH]] * 3),
        box_Im4=np.array([boxes] * 3, dtype=np.uint16),
        flip_Im=np.array([[False, True, False]] * 3),
    )
    rows = {}
    for backend in ("cpu", "dali"):
        with open_replay(backend, [View((24, 24)), View((20, 32), "bicubic")]) as replayer:
            (pixels,) = replayer.run([request])
        assert [(f.image, f.code) for f in pixels.failures] == [(2, "size-differs")]
        rows[backend] = [view.unflatten(0, (3, 3)).clone() for view in pixels.views]
    for ours, theirs in zip(rows["cpu"], rows["dali"], strict=True):
        assert torch.equal(ours[1], theirs[1])
        assert not torch.equal(ours[0], ours[1])
