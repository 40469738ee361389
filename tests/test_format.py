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
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import CLASSES
from pipeline import make_store

PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
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

    from fkdpipe.taps import Needs

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
