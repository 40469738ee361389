"""docs/format.md is enough: a store read with zarr, numpy and the standard library alone.

Nothing of fkdpipe is imported here except to make the store; the reader below is written from the
page.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from decimal import Context, Decimal
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import CLASSES
from pipeline import make_store

from fkdpipe.pixels.crops import CropDistribution, Jitter

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
FORMS = ["topk:3", "topk:3:compact", "hard", "full", "logits"]


def crc32c(data: bytes) -> str:
    """Castagnoli, bit by bit: polynomial 0x1EDC6F41, reflected, all ones before and after."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    value = 0xFFFFFFFF
    for byte in data:
        value = table[(value ^ byte) & 255] ^ (value >> 8)
    return f"{value ^ 0xFFFFFFFF:08x}"


def crc32(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def canonical(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def record(file: Path) -> dict:
    content = json.loads(file.read_bytes())
    assert content["crc32c"] == crc32c(canonical(content["body"]))
    return content["body"]


def group(place: Path, path: str) -> dict:
    return dict(zarr.open_group(store=str(place), path=path, mode="r").attrs["fkdpipe"])


def array(place: Path, path: str) -> np.ndarray:
    return zarr.open_array(store=str(place), path=path, mode="r")[...]


def labels(place: Path, path: str) -> np.ndarray:
    """(N, M, C) probabilities, by the page's rules."""
    settings = group(place, path)["settings"]
    form, classes = settings["form"], settings["classes"]
    if form in ("full", "logits"):
        z = array(place, f"{path}/{'log_prob' if form == 'full' else 'logit'}").astype(np.float64)
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    ids = array(place, f"{path}/ids").astype(int)
    if form == "hard":
        return np.eye(classes)[ids[..., 0]]
    if form.endswith(":compact"):
        left = np.ones(ids.shape[:2])
        prob = np.empty(ids.shape)
        for k, code in enumerate(np.moveaxis(array(place, f"{path}/stick"), -1, 0)):
            prob[..., k] = np.sin(code * math.pi / 510) ** 2 * left
            left = left - prob[..., k]
    else:
        prob = array(place, f"{path}/prob").astype(np.float64)
        prob = prob / np.maximum(prob.sum(-1, keepdims=True), 1)
    spread = (1 - prob.sum(-1, keepdims=True)) / (classes - ids.shape[-1])
    dense = np.repeat(np.maximum(spread, 0), classes, axis=-1)
    np.put_along_axis(dense, ids, prob, axis=-1)
    return dense


@pytest.fixture(scope="module")
def stores(tmp_path_factory, folder, checkpoint):
    from conftest import load_teacher

    from fkdpipe.networks.feature_layers import Needs

    taught = load_teacher(checkpoint, needs=Needs(pre=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 32)
        made = {}
        for form in FORMS:
            place = tmp_path_factory.mktemp("format") / form.replace(":", "-")
            code = "int8" if form == "hard" else "float16"
            make_store(place, folder, [taught], form=form, features=("pre",), features_code=code)
            made[form] = place
    return made


def test_every_form_reads_as_probabilities_that_agree(stores):
    exact = labels(stores["full"], "rounds/0/labels/t")
    assert np.allclose(exact.sum(-1), 1)
    first = exact.argmax(-1)
    for form, place in stores.items():
        made = labels(place, "rounds/0/labels/t")
        assert made.shape == exact.shape == (51, 4, len(CLASSES))
        assert np.allclose(made.sum(-1), 1, atol=1e-6)
        assert (made.argmax(-1) == first).mean() > 0.97
        if form == "logits":
            assert np.abs(made - exact).max() < 5e-3


def test_images_are_the_folders(stores, folder):
    place = stores["hard"]
    keys = array(place, "images/key")
    names = array(place, "images/class_name")
    classes, sizes = array(place, "images/class"), array(place, "images/size")
    lengths = array(place, "images/bytes")
    facts = group(place, "")
    assert (facts["format"], facts["version"], facts["images"]) == ("fkdpipe", 1, len(keys))
    from PIL import Image

    for key, index, size, length in zip(keys, classes, sizes, lengths, strict=True):
        file = folder / "train" / re.sub("%25", "%", str(key))
        assert file.stat().st_size == length
        assert str(key).split("/")[0] == names[index]
        with Image.open(file) as image:
            assert [image.height, image.width] == size.tolist()


def test_boxes_lie_in_their_images(stores):
    place = stores["full"]
    box, size = array(place, "rounds/0/crops/box").astype(int), array(place, "images/size")
    assert (box[..., 0] + box[..., 2] <= size[:, None, 0]).all()
    assert (box[..., 1] + box[..., 3] <= size[:, None, 1]).all()
    assert array(place, "rounds/0/crops/flip").dtype == bool


def test_features_read_as_the_page_says(stores):
    plain = array(stores["full"], "rounds/0/features/t/pre/value").astype(np.float64)
    facts = group(stores["hard"], "rounds/0/features/t/pre")
    assert facts["settings"]["code"] == "int8"
    code = array(stores["hard"], "rounds/0/features/t/pre/code").astype(np.float64)
    scale = array(stores["hard"], "rounds/0/features/t/pre/scale")[..., None]
    made = (code / 127) ** 3 * scale
    assert np.abs(made - plain).max() <= 0.013 * scale.max()


ALL, G = 2**64 - 1, 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x = (x + G) & ALL
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & ALL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & ALL
    return x ^ (x >> 31)


def image_id(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


class Stream:
    """One field of one crop."""

    def __init__(self, seed: int, key: str, crop: int, field: int) -> None:
        state = mix(mix(mix(seed) ^ image_id(key)) ^ mix((crop + G) & ALL))
        self.start = mix(state ^ mix((field + 1) << 32))

    def draw(self, n: int) -> int:
        return mix((self.start + (n + 1) * G) & ALL)

    def uniform(self, n: int) -> float:
        return (self.draw(n) >> 11) / 2**53

    def below(self, n: int, limit: int) -> int:
        return ((self.draw(n) >> 32) * limit) >> 32


def exp(x: float) -> float:
    k = round(x / 0.6931471805599453)
    r = x - k * 0.6931471805599453
    y = 1.0
    for n in range(14, 0, -1):
        y = 1 + (y * r) / n
    return y * 2.0**k


def drawn_box(settings: dict, stream: Stream, H: int, W: int) -> list[int]:
    low, high = settings["ratio"]
    ln_low, ln_high = (float(Decimal(x).ln(Context(prec=40))) for x in (low, high))
    least, most = settings["scale"]
    for a in range(10):
        area = (H * W) * (least + (most - least) * stream.uniform(4 * a))
        aspect = exp(ln_low + (ln_high - ln_low) * stream.uniform(4 * a + 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= W and 0 < h <= H:
            return [stream.below(4 * a + 2, H - h + 1), stream.below(4 * a + 3, W - w + 1), h, w]
    h = min(H, round(W / low)) if low * H > W else H
    w = min(W, round(H * high)) if high * H < W else W
    return [(H - h) // 2, (W - w) // 2, h, w]


def test_derived_boxes_are_drawn_from_the_page_alone(tmp_path, folder, teacher):
    """With jitter, a ratio that often fits nothing, and a second round."""
    jitter = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}
    distribution = CropDistribution(
        scale=(0.6, 1.0), ratio=(1.5, 2.5), flip=0.3, jitter=Jitter(**jitter)
    )
    for crops in (3, 5):
        make_store(
            tmp_path,
            folder,
            [teacher],
            crop=distribution,
            crops=crops,
            seed=7,
            boxes="derived",
            form="hard",
        )
    keys, sizes = array(tmp_path, "images/key").tolist(), array(tmp_path, "images/size").tolist()
    seed = group(tmp_path, "")["order_seed"]
    assert keys == sorted(keys, key=lambda k: (mix(mix(seed) ^ image_id(k)), image_id(k)))
    for number in (0, 1):
        path = f"rounds/{number}/crops"
        settings = group(tmp_path, path)["settings"]
        first, seed = settings["first"], settings["seed"]
        places = [(k, size, c + first) for k, size in zip(keys, sizes, strict=True)
                  for c in range(settings["crops"])]  # fmt: skip
        box = [drawn_box(settings, Stream(seed, k, c, 0), *size) for k, size, c in places]
        flip = [Stream(seed, k, c, 1).uniform(0) < settings["flip"] for k, _, c in places]
        factor = [
            centre + settings["jitter"][name] * (2 * Stream(seed, k, c, 2 + f).uniform(0) - 1)
            for k, _, c in places
            for f, (name, centre) in enumerate(zip(jitter, (1, 1, 1, 0), strict=True))
        ]
        data = np.array(box, "<u2").tobytes() + np.array(flip).tobytes()
        data += np.array(factor, "<f4").tobytes()
        made = record(tmp_path / "commits" / path / "0.json")["made"]
        assert made["crops_crc32c"] == crc32c(data)


@pytest.mark.parametrize("form", FORMS)
def test_markers_and_manifests_say_what_is_there(stores, form):
    place = stores[form]
    seen = set()
    for file in sorted(place.glob("commits/**/manifest.json")):
        part = file.parent.relative_to(place / "commits").as_posix()
        manifest = record(file)
        facts = group(place, part)
        assert manifest["part"] == part
        assert manifest["settings"] == hashlib.sha256(canonical(facts["settings"])).hexdigest()
        files: dict = {}
        for unit, (length, checksum) in manifest["markers"].items():
            marker_file = file.parent / f"{unit}.json"
            assert [marker_file.stat().st_size, crc32(marker_file.read_bytes())] == [
                length,
                checksum,
            ]
            marker = record(marker_file)
            assert (marker["part"], marker["unit"]) == (part, int(unit))
            files |= marker["files"]
        assert files == manifest["files"]
        for key, (length, checksum) in files.items():
            data = (place / key).read_bytes()
            assert (len(data), crc32(data)) == (length, checksum)
        record(file.with_name("part.json"))
        for key, text in record(file.with_name("part.json"))["metadata"].items():
            assert (place / key).read_text() == text
        seen |= set(files) | {f"commits/{part}/{f.name}" for f in file.parent.glob("*.json")}
    others = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()} - seen
    assert all(key.endswith("zarr.json") for key in others)


def test_the_page_names_every_array_and_codec(stores):
    for place in stores.values():
        for file in place.rglob("zarr.json"):
            meta = json.loads(file.read_text())
            if meta["node_type"] == "array":
                assert f"`{file.parent.name}`" in PAGE
                names = [c["name"] for c in meta["codecs"]]
                if names == ["sharding_indexed"]:
                    names = [c["name"] for c in meta["codecs"][0]["configuration"]["codecs"]]
                assert names[-1] == "crc32c"
                assert set(names) <= {"bytes", "vlen-utf8", "transpose", "blosc", "zstd", "crc32c"}


def test_crc32c_here_is_the_standards():
    """RFC 3720, B.4: 32 bytes of zeros."""
    assert crc32c(b"\0" * 32) == "8a9136aa"
