"""PNG: every mode gives the same pixels in all decoders, and damage fails alone, never the process.

What may crash runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode

from fkdpipe.pixels.replay import Request, View, cpu, open_replay

HEIGHT, WIDTH = 40, 50
SOUND = (
    "L", "LA", "RGB", "RGBA", "P", "1", "P of 4 bits", "L of 2 bits",
    "L transparent", "RGB transparent", "P transparent", "P alpha", "gamma",
)  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def change_data(png: bytes, change) -> bytes:
    """The same PNG with other IDAT chunks, checksums right."""
    made, at = png[:8], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        made += chunk(kind, change(data) if kind == b"IDAT" else data)
        at += 12 + length
    return made


def write(kind: str, file: Path, cut) -> None:
    picture = cut(3, HEIGHT, WIDTH)
    alpha = cut(4, HEIGHT, WIDTH).convert("L")
    if kind in ("LA", "RGBA"):
        picture = picture.convert(kind)
        picture.putalpha(alpha)
        picture.save(file)
    elif kind in ("L", "RGB", "P", "1"):
        picture.convert(kind).save(file)
    elif kind == "P of 4 bits":
        picture.quantize(13).save(file, bits=4)
    elif kind == "L of 2 bits":
        rows = np.random.default_rng(0).integers(0, 256, (HEIGHT, 1 + -(-WIDTH // 4)), np.uint8)
        rows[:, 0] = 0  # the row's filter
        header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 2, 0, 0, 0, 0)
        data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes()))
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b""))
    elif kind == "P alpha":
        picture.convert("P").save(file, transparency=bytes(range(256)))
    elif kind == "gamma":
        picture.save(file)
        png = file.read_bytes()
        file.write_bytes(png[:33] + chunk(b"gAMA", struct.pack(">I", 100_000)) + png[33:])
    else:
        picture = picture.convert(kind.split()[0])
        picture.save(file, transparency=picture.getpixel((3, 3)))


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_png_has_the_pixels_of_torchvision_and_dali(kind, tmp_path, cut):
    file = tmp_path / "x.png"
    write(kind, file, cut)
    encoded = torch.from_numpy(np.fromfile(file, dtype=np.uint8))
    expected = torch.ops.image.decode_image(encoded, ImageReadMode.RGB.value, False)
    found = cpu.decode(os.fsencode(file), (HEIGHT, WIDTH))
    assert torch.equal(found, expected)
    whole = Request(
        paths=[os.fsencode(file)],
        size_I2=np.array([[HEIGHT, WIDTH]]),
        box_Im4=np.array([[[0, 0, HEIGHT, WIDTH]] * 2], dtype=np.uint16),
        flip_Im=np.array([[False, True]]),
    )
    with open_replay("dali", [View((HEIGHT, WIDTH))]) as replayer:
        (pixels,) = replayer.run([whole])
    assert not pixels.failures
    assert torch.equal(pixels.views[0][0], expected)


def test_a_png_of_16_bits_is_named_as_such(tmp_path):
    picture = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH)).astype(np.uint16)
    Image.fromarray(picture).save(tmp_path / "x.png")
    assert cpu.decode(os.fsencode(tmp_path / "x.png"), (HEIGHT, WIDTH))[0] == "16-bit"


REPLAY = """
import json, os, sys
import numpy as np
from fkdpipe.pixels.replay import Request, View, open_replay
backend, height, width, *files = sys.argv[1:]
count, size = len(files), [int(height), int(width)]
for m in (1, 2):
    request = Request(
        [os.fsencode(f) for f in files],
        np.array([size] * count),
        np.array([[[0, 0, *size]] * m] * count, dtype=np.uint16),
        np.zeros((count, m), dtype=bool),
    )
    with open_replay(backend, [View((20, 20))]) as replayer:
        (pixels,) = replayer.run([request])
    print(json.dumps([[f.image, f.code, f.detail] for f in pixels.failures]))
"""


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_damaged_pngs_fail_alone(backend, tmp_path, cut):
    cut(5, HEIGHT, WIDTH).save(tmp_path / "good.png")
    png = (tmp_path / "good.png").read_bytes()
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 4
    damaged = {
        "flipped": bytes(flipped),
        "stream": change_data(png, lambda d: d[:50] + b"\xff" * 40 + d[90:]),
        "short": change_data(png, lambda d: d[: len(d) // 2]),
        "cut": png[: len(png) // 2],
        "header": png[:16] + b"\xff" * 4 + png[20:],
    }
    files = [tmp_path / "good.png"]
    for name, content in damaged.items():
        files.append(tmp_path / f"{name}.png")
        files[-1].write_bytes(content)
    command = [sys.executable, "-W", "ignore", "-c", REPLAY, backend, str(HEIGHT), str(WIDTH)]
    done = subprocess.run(
        [*command, *map(str, files)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines()[-2:]:
        failures = json.loads(line)
        assert [image for image, _, _ in failures] == [1, 2, 3, 4, 5]
        assert {code for _, code, _ in failures} == {"unreadable"}
        assert all(detail and "object at" not in detail for _, _, detail in failures)


WRONG_CHECKSUMS = ("checksum", "last checksum", "no end", "cut end", "text after")


def with_wrong_checksum(kind: str, png: bytes) -> bytes:
    start = png.find(b"IDAT") - 4
    data = png[start + 8 : len(png) - 16]
    half = len(data) // 2
    last = chunk(b"IDAT", data[half:])
    changed = last[:-1] + bytes([last[-1] ^ 1])
    text = chunk(b"tEXt", b"a\0b")
    return (
        png[:start]
        + {
            "checksum": changed_first(chunk(b"IDAT", data)) + chunk(b"IEND", b""),
            "last checksum": chunk(b"IDAT", data[:half]) + changed + chunk(b"IEND", b""),
            "no end": chunk(b"IDAT", data),
            "cut end": chunk(b"IDAT", data) + chunk(b"IEND", b"")[:6],
            "text after": chunk(b"IDAT", data) + changed_first(text) + chunk(b"IEND", b""),
        }[kind]
    )


def changed_first(chunk_: bytes) -> bytes:
    """A chunk with another checksum."""
    return chunk_[:-4] + bytes([chunk_[-4] ^ 1]) + chunk_[-3:]


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("kind", WRONG_CHECKSUMS)
def test_both_replays_read_a_png_with_a_wrong_checksum(kind, m, tmp_path, cut, capfd):
    """Pillow reads them, libpng in DALI refuses some; the other images of the batch stay."""
    cut(5, HEIGHT, WIDTH).save(tmp_path / "good.png")
    cut(6, HEIGHT, WIDTH).save(tmp_path / "other.jpg")
    png = (tmp_path / "good.png").read_bytes()
    assert png.count(b"IDAT") == 1
    (tmp_path / "bad.png").write_bytes(with_wrong_checksum(kind, png))
    files = [os.fsencode(tmp_path / name) for name in ("good.png", "bad.png", "other.jpg")]
    request = Request(
        paths=files,
        size_I2=np.array([[HEIGHT, WIDTH]] * 3),
        box_Im4=np.array([[[0, 0, HEIGHT, WIDTH]] * m] * 3, dtype=np.uint16),
        flip_Im=np.array([[True] * m] * 3),
    )
    rows = {}
    for backend in ("cpu", "dali"):
        with open_replay(backend, [View((HEIGHT, WIDTH))]) as replayer:
            (pixels,) = replayer.run([request])
        assert not pixels.failures
        rows[backend] = pixels.views[0].unflatten(0, (3, m)).clone()
    good = torch.from_numpy(np.array(Image.open(tmp_path / "good.png"))).permute(2, 0, 1).flip(-1)
    assert (rows["cpu"][:2] == good).all()
    assert torch.equal(rows["dali"], rows["cpu"])
    capfd.readouterr()  # the decoder prints on stderr by itself


def test_a_broken_png_is_skipped_by_evaluation_and_inspection(tmp_path, cut):
    """Pillow raises SyntaxError where a chunk is broken."""
    from fkdpipe.common.errors import ReplayError
    from fkdpipe.inspect import views
    from fkdpipe.networks.models import Preprocessing
    from fkdpipe.pixels import images
    from fkdpipe.train import evaluate

    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(noise).save(tmp_path / "a" / "bad.png")
    png = (tmp_path / "a" / "bad.png").read_bytes()
    second = png.find(b"IDAT", png.find(b"IDAT") + 4)
    (tmp_path / "a" / "bad.png").write_bytes(png[:second] + b"\1\2\3\4" + png[second + 4 :])
    cut(1, 40, 50).save(tmp_path / "a" / "good.jpg")
    folder = images.scan(tmp_path)
    assert folder.keys == ("a/bad.png", "a/good.jpg")
    ways = Preprocessing((32, 32), "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    ((pixels, rows),) = evaluate.batches(ways, folder, batch=4, threads=1)
    assert (len(pixels), rows.tolist()) == (1, [1])
    with pytest.raises(ReplayError, match="cannot be decoded"):
        views.whole(images.path_of(folder.root, "a/bad.png"), folder.size_N2[0], 100)


def test_a_missing_file_is_named_in_plain_words(tmp_path):
    path = os.fsencode(tmp_path / "it's not here.png")
    assert cpu.decode(path, (8, 8)) == ("unreadable", "No such file or directory")
