"""ml-dr, TinyViT, SRe2L and Parquet: in, out, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import foreign
import numpy as np
import pipeline
import pytest
import torch
from exchange import agree, bring, content, send

from fkdpipe.common.errors import LabelsError, UsageError
from fkdpipe.interchange import imagefolder, tinyvit
from fkdpipe.pixels import images


@pytest.fixture
def truth(few):
    return foreign.make_truth(images.scan(few), crops=3, k=3, classes=1000, half=True)


@pytest.fixture(scope="module")
def order(few):
    return foreign.imagefolder_keys(few / "train")


def test_the_order_of_imagefolder_is_known_without_listing_the_folder(folder, tmp_path):
    data = shutil.copytree(folder / "train", tmp_path / "data")
    (data / "ash" / "broken.jpg").write_bytes(b"no image")
    (data / "ash" / "notes.txt").write_text("no image")
    (data / "beech" / "a b").mkdir()
    (data / "beech" / "a").mkdir()
    for name in ("a b/1.JPG", "a/2.jpeg", "noextension"):
        shutil.copy(data / "ash" / "0.jpg", data / "beech" / name)
    expected = foreign.imagefolder_keys(data)
    scanned = images.scan(data)
    index = imagefolder.index_of(scanned.keys, [r.key for r in scanned.rejected])
    assert index[scanned.keys.index("beech/noextension")] == -1
    found = {i: key for i, key in zip(index.tolist(), scanned.keys, strict=True) if i >= 0}
    assert "ash/broken.jpg" in expected
    assert found == {i: key for i, key in enumerate(expected) if key != "ash/broken.jpg"}


@pytest.mark.parametrize("compress", [True, False])
def test_mldr_comes_in_and_goes_out(tmp_path, few, truth, order, compress):
    place = foreign.write_mldr(tmp_path / "reinforced_data", truth, order, compress=compress)
    made = bring("ml-dr", tmp_path, few, tmp_path / "store")
    assert (made.form, made.crops, made.failed.total()) == ("topk:3", 3, 0)
    agree(content(made.store), truth)
    settings = made.store.part("rounds/0/labels/ml-dr").settings
    assert (settings.temperature, settings.classes) == (1.0, 1000)
    out = send("ml-dr", made.store, tmp_path / "out")
    assert out.files == len(truth) + 1
    agree(content(bring("ml-dr", tmp_path / "out", few, tmp_path / "back").store), truth)
    index, samples = torch.load(tmp_path / "out" / "4.pth.tar", weights_only=True)
    assert index == 4
    assert samples[1]["params"] == [
        tuple(truth[order[4]]["box"][1].tolist()),
        bool(truth[order[4]]["flip"][1]),
    ]
    assert {type(p) for p in samples[0]["prob"][0]} == {float}
    config = torch.load(tmp_path / "out" / "config.pth.tar", weights_only=True)
    assert config["reinforce"]["num_samples"] == 3
    assert place.is_dir()


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    "operations",
    [
        {"rand_augment": [None, [(3, 0.5), (1, -0.1)], None]},
        {"random_erase": [(-1, 0, 0, 0), (3, 4, 5, 6), None]},
        {"mixup": [None, 0.3, None]},
        {"cutmix": [None, [0.4, np.int64(1), 2, 3, 4], None]},
        {"rand_augment": [None, [(1, 1.0)] * 2, None], "mixup": [None] * 3},
    ],
    ids=lambda o: "+".join(o),
)
def test_mldr_samples_of_other_pixels_are_refused_or_left_out(
    tmp_path,
    few,
    truth,
    order,
    operations,
    compress,
):
    place = foreign.write_mldr(
        tmp_path / "r", truth, order, operations=operations, compress=compress
    )
    name = next(iter(operations))
    with pytest.raises(LabelsError, match=rf"{name} \(20\).*at least 2 per image"):
        bring("ml-dr", place, few, tmp_path / "store")
    with pytest.raises(UsageError, match="--crops M"):
        bring("ml-dr", place, few, tmp_path / "store", skip_transformed=True)
    made = bring("ml-dr", place, few, tmp_path / "store", skip_transformed=True, crops=2)
    plain = {
        key: {n: v if n == "size" else v[[0, 2]] for n, v in entry.items()}
        for key, entry in truth.items()
    }
    agree(content(made.store), plain)


def test_mldr_labels_of_another_folder_are_refused(tmp_path, few, truth, order):
    place = foreign.write_mldr(tmp_path / "r", truth, order)
    fewer = shutil.copytree(few, tmp_path / "fewer")
    (fewer / "train" / order[3]).unlink()
    with pytest.raises(LabelsError, match=r"20 images.* lists 19"):
        bring("ml-dr", place, fewer, tmp_path / "store")
    shutil.copy(place / "3.pth.tar", place / "4.pth.tar")
    made = bring("ml-dr", place, few, tmp_path / "store")
    assert made.failed == {"wrong-index": 1}
    (place / "config.pth.tar").unlink()
    with pytest.raises(LabelsError, match=r"config.pth.tar.*joblib"):
        bring("ml-dr", place, few, tmp_path / "s2")


def test_mldr_crops_of_resized_images_are_refused(tmp_path, few, truth, order):
    place = foreign.write_mldr(tmp_path / "r", truth, order, operations={"center_crop": [None] * 3})
    with pytest.raises(LabelsError, match="center_crop"):
        bring("ml-dr", place, few, tmp_path / "store")


@pytest.mark.parametrize("size", [(375, 500), (40, 90), (1, 7), (3000, 80), (60, 60)])
def test_seeds_resolve_to_the_boxes_that_timms_code_draws(size):
    for seed in [0, 1, 2**31 - 1, *np.random.default_rng(1).integers(0, 2**31, 400).tolist()]:
        assert tinyvit.resolve(seed, *size) == foreign.timm_crop_and_flip(seed, *size)


@pytest.mark.parametrize("names", [False, True])
def test_tinyvit_comes_in_and_goes_out(tmp_path, few, order, names):
    truth = foreign.make_truth(images.scan(few), crops=11, k=4, classes=32_768, half=True)
    if names:  # keys are names without folders, so they must differ
        few = shutil.copytree(few, tmp_path / "few")
        for key in list(truth):
            new = f"{key[0]}/{key[0]}_{key[2:]}"
            (few / "train" / key).rename(few / "train" / new)
            truth[new] = truth.pop(key)
        order = foreign.imagefolder_keys(few / "train")
    place = foreign.write_tinyvit(tmp_path / "logits", truth, order, names=names)
    made = bring("tinyvit", place, few, tmp_path / "store", classes=32_768, assume_plain=True)
    assert (made.form, made.crops, made.failed.total()) == ("topk:4", 11, 0)
    agree(content(made.store), truth, tolerance=0)
    send("tinyvit", made.store, tmp_path / "out")
    key = Path(order[5]).stem if names else "5"
    entry = truth[order[5]]
    for epoch in (0, 10):
        seed, ids, prob = foreign.read_tinyvit(tmp_path / "out", key, 4, epoch)
        assert seed == entry["seed"][epoch]
        np.testing.assert_array_equal(ids, entry["ids"][epoch])
        np.testing.assert_array_equal(prob, entry["prob"][epoch].astype(np.float16))
    back = bring(
        "tinyvit", tmp_path / "out", few, tmp_path / "back", classes=32_768, assume_plain=True
    )
    agree(content(back.store), truth, tolerance=0)
    made = bring(
        "tinyvit", place, few, tmp_path / "two", classes=32_768, assume_plain=True, crops=2
    )
    assert made.crops == 2


def test_tinyvit_says_what_it_cannot_know(tmp_path, few, truth, order):
    place = foreign.write_tinyvit(tmp_path / "logits", truth, order)
    with pytest.raises(LabelsError, match=r"RandAugment.*--assume-plain"):
        bring("tinyvit", place, few, tmp_path / "store")
    with pytest.raises(LabelsError, match="32,767"):
        bring("tinyvit", place, few, tmp_path / "store", assume_plain=True, classes=40_000)
    with pytest.raises(LabelsError, match="fewer than --crops 9"):
        bring("tinyvit", place, few, tmp_path / "store", assume_plain=True, classes=999, crops=9)
    values = place / "logits_top3_epoch1" / "rank1-values.bin"
    values.write_bytes(values.read_bytes()[:-5])
    with pytest.raises(LabelsError, match="truncated"):
        bring("tinyvit", place, few, tmp_path / "store", assume_plain=True, classes=1000)
    with pytest.raises(LabelsError, match="no folder logits_top"):
        bring("tinyvit", few, few, tmp_path / "store", assume_plain=True)


def test_images_without_a_record_in_some_epoch_are_left_out(tmp_path, few, truth, order):
    place = foreign.write_tinyvit(tmp_path / "logits", truth, order, ranks=1)
    folder = place / "logits_top3_epoch2"
    keys = (folder / "rank0-keys.txt").read_text().splitlines()
    (folder / "rank0-keys.txt").write_text("\n".join(["999", *keys[1:-1], "1000"]) + "\n")
    made = bring("tinyvit", place, few, tmp_path / "store", assume_plain=True, classes=1000)
    assert made.failed == {"no-label": 1}
    lost = order[int(keys[0])]
    agree(content(made.store), {key: e for key, e in truth.items() if key != lost})


def test_only_crops_of_seeds_go_out_to_tinyvit(tmp_path, few, truth):
    place = foreign.write_fkd(tmp_path / "labels", truth)
    store = bring("fkd", place, few, tmp_path / "store", classes=1000).store
    with pytest.raises(LabelsError, match="seed"):
        send("tinyvit", store, tmp_path / "out")


def test_parquet_is_a_table_of_crops(tmp_path, few, truth):
    import json

    import pyarrow.parquet as pq

    place = foreign.write_fkd(tmp_path / "labels", truth)
    (place / "train" / "a" / "i0.tar").unlink()
    store = bring("fkd", place, few, tmp_path / "store", classes=1000, temperature=2.0).store
    made = send("parquet", store, tmp_path / "table", keep=2)
    assert any("a/i0.jpg" in note for note in made.notes)
    table = pq.read_table(tmp_path / "table" / "labels.parquet")
    assert json.loads(table.schema.metadata[b"fkdpipe"])["settings"]["temperature"] == 2.0
    rows = table.to_pylist()
    assert len(rows) == (len(truth) - 1) * 3
    for row in rows:
        entry, crop = truth[row["key"]], row["crop"]
        box = [row["top"], row["left"], row["height"], row["width"]]
        assert box == entry["box"][crop].tolist()
        assert row["flip"] == entry["flip"][crop]
        assert row["ids"] == entry["ids"][crop, :2].tolist()
        np.testing.assert_allclose(row["prob"], entry["prob"][crop, :2])
        assert (row["image_height"], row["image_width"]) == tuple(entry["size"])
        assert row["jitter"] is None
        assert row["class"] == "abc".index(row["key"][0])


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_sre2l_batches_are_put_back_in_the_order_of_images(tmp_path, few, truth, order, dtype):
    random = np.random.default_rng(0)
    for entry in truth.values():
        entry["logits"] = random.normal(0, 4, (3, 7)).astype(dtype)
    place = foreign.write_sre2l(tmp_path / "fkd", truth, order, batch=6)
    made = bring("sre2l", place, few, tmp_path / "store")
    assert (made.form, made.crops, made.failed.total()) == ("logits", 3, 0)
    found = content(made.store, keep=7)
    for key, entry in truth.items():
        np.testing.assert_array_equal(found[key]["box"], entry["box"])
        np.testing.assert_array_equal(found[key]["flip"], entry["flip"])
        z = entry["logits"].astype(np.float64)
        prob = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        for crop in range(3):
            np.testing.assert_allclose(
                found[key]["prob"][crop], prob[crop][found[key]["ids"][crop]], rtol=0.02
            )
    arrays = pipeline.arrays_of(made.store)
    name = "rounds/0/labels/sre2l"
    whole = arrays[f"{name}/logit"].astype(np.float32) + arrays[f"{name}/logit_max"][..., None]
    rows = [truth[str(key)]["logits"] for key in made.store.images.keys]
    np.testing.assert_allclose(whole, np.stack(rows).astype(np.float32), rtol=2e-3, atol=5e-3)


def test_sre2l_files_that_cannot_be_placed_are_refused(tmp_path, few, truth, order):
    for entry in truth.values():
        entry["logits"] = np.zeros((3, 7), dtype=np.float16)
    mixed = foreign.write_sre2l(
        tmp_path / "mixed", truth, order, batch=6, mix=(torch.arange(6), 0.3, [1, 2, 3, 4])
    )
    with pytest.raises(LabelsError, match="mixup or cutmix"):
        bring("sre2l", mixed, few, tmp_path / "store")
    place = foreign.write_sre2l(tmp_path / "fkd", truth, order, batch=6)
    fewer = shutil.copytree(few, tmp_path / "fewer")
    for key in order[:4]:
        (fewer / "train" / key).unlink()
    with pytest.raises(LabelsError, match="other images"):
        bring("sre2l", place, fewer, tmp_path / "store")
    (place / "epoch_1" / "batch_2.tar").unlink()
    with pytest.raises(LabelsError, match="1 of them are missing"):
        bring("sre2l", place, few, tmp_path / "store")
    made = bring("sre2l", place, few, tmp_path / "store", crops=1)
    assert made.crops == 1
    with pytest.raises(LabelsError, match="4 are needed"):
        bring("sre2l", place, few, tmp_path / "s2", crops=4)


def test_recorded_colour_jitter_goes_where_it_can_be_kept(tmp_path, folder, teacher):
    import pyarrow.parquet as pq

    from fkdpipe.pixels.crops import CropDistribution, Jitter

    distribution = CropDistribution(jitter=Jitter(0.4, 0.4, 0.4, 0.1))
    store = pipeline.make_store(tmp_path / "store", folder, [teacher], crops=2, crop=distribution)
    for name in ("fkd", "ml-dr"):
        with pytest.raises(LabelsError, match="colour jitter"):
            send(name, store, tmp_path / name)
    send("parquet", store, tmp_path / "table")
    rows = pq.read_table(tmp_path / "table" / "labels.parquet").to_pylist()
    factors = pipeline.arrays_of(store)["rounds/0/crops/jitter"]
    place = {str(key): row for row, key in enumerate(store.images.keys)}
    for row in rows:
        np.testing.assert_array_equal(row["jitter"], factors[place[row["key"]], row["crop"]])


def test_the_guides_commands_run_as_written(tmp_path, few, truth, order, monkeypatch):
    import re
    import shlex

    from click.testing import CliRunner

    from fkdpipe.cli import cli

    guide = (Path(__file__).parents[2] / "docs" / "guide-interchange.md").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(few, "images")
    wide = foreign.make_truth(images.scan(few), crops=4, k=5, classes=1000, half=True)
    foreign.write_fkd(tmp_path / "soft_labels", wide)
    foreign.write_mldr(tmp_path / "reinforced_data", truth, order)
    foreign.write_tinyvit(tmp_path / "logits", truth, order)
    for name, dtype in (("label_maps", torch.float32), ("token_maps", torch.float16)):
        maps = foreign.make_maps(images.scan(few), cells=(5, 5), k=5, classes=1000, dtype=dtype)
        for key, values in maps.items():
            path = tmp_path / name / f"{key.rsplit('.', 1)[0]}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(values, path)
    for entry in truth.values():
        entry["logits"] = np.zeros((3, 7), dtype=np.float16)
    foreign.write_sre2l(tmp_path / "batch_labels", truth, order, batch=6)
    blocks = re.findall(r"^```sh\n(.*?)^```", guide, re.S | re.M)
    lines = [line for block in blocks[1:] + blocks[:1] for line in block.splitlines()]
    small = "--student test_resnet --size 32 --batch-size 8 --cache cache"
    for line in lines:
        line = line.replace("--student resnet18", small).replace("--epochs 100", "--epochs 4")
        done = CliRunner().invoke(cli, shlex.split(line)[1:])
        assert done.exit_code == 0, f"{line}\n{done.output}"
    assert len(lines) == 13
