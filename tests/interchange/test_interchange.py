"""Labels of other systems become stores, and stores become their labels again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import foreign
import numpy as np
import pipeline
import pytest
import torch
from click.testing import CliRunner
from exchange import agree, bring, content, send

from fkdpipe.cli import cli
from fkdpipe.common.errors import LabelsError, StoreMismatchError, UsageError
from fkdpipe.interchange import importing
from fkdpipe.interchange.source import to_pixels
from fkdpipe.pixels import images
from fkdpipe.storage import verify
from fkdpipe.storage.store import open_store

M = 4


@pytest.mark.parametrize("tensors", [False, True], ids=["numpy", "tensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("label", "k", "form"),
    [
        ("marginal", 5, "topk:5"),
        ("marginal", 10, "topk:10"),
        ("smoothing", 1, "topk:1"),
        ("hard", 1, "hard"),
    ],
)
def test_fkd_files_come_in_as_they_are(tmp_path, few, label, k, form, dtype, tensors):
    truth = foreign.make_truth(images.scan(few), crops=M, k=k, classes=1000, half=True)
    if label == "hard":
        for entry in truth.values():
            entry["prob"] = np.ones_like(entry["prob"])
    place = foreign.write_fkd(tmp_path / "l", truth, label=label, dtype=dtype, tensors=tensors)
    made = bring("fkd", place, few, tmp_path / "store", classes=1000)
    assert (made.form, made.crops, made.failed.total()) == (form, M, 0)
    agree(content(made.store), truth)


@pytest.mark.parametrize("classes", [3000, 40_000, 70_000])
def test_class_ids_beyond_what_float16_and_int16_hold_survive(tmp_path, few, classes):
    truth = foreign.make_truth(images.scan(few), crops=2, k=5, classes=classes)
    largest = max(entry["ids"].max() for entry in truth.values())
    assert largest > classes * 0.9
    place = foreign.write_fkd(tmp_path / "labels", truth)
    made = bring("fkd", place, few, tmp_path / "store", classes=classes)
    agree(content(made.store), truth)
    again = send("fkd", made.store, tmp_path / "out")
    assert again.files == len(truth)
    back = bring("fkd", tmp_path / "out", few, tmp_path / "back", classes=classes)
    agree(content(back.store), truth)


def test_half_precision_class_ids_are_refused_with_many_classes(tmp_path, few):
    truth = foreign.make_truth(images.scan(few), crops=2, k=5, classes=1000)
    place = foreign.write_fkd(tmp_path / "labels", truth, dtype=np.float16)
    with pytest.raises(LabelsError, match="2,048"):
        bring("fkd", place, few, tmp_path / "store", classes=3000)


@pytest.mark.parametrize("prefix", ["", "imagenet/train", "a/b/c/train", "train"])
def test_any_folder_depth_is_found(tmp_path, few, prefix):
    truth = foreign.make_truth(images.scan(few), crops=2, k=5, classes=1000)
    place = foreign.write_fkd(tmp_path / "labels", truth, prefix=prefix)
    agree(content(bring("fkd", place, few, tmp_path / "store", classes=1000).store), truth)


def test_two_label_sets_under_one_folder_ask_which(tmp_path, few):
    truth = foreign.make_truth(images.scan(few), crops=2, k=5, classes=1000)
    for name in ("first", "second"):
        place = foreign.write_fkd(tmp_path / "labels", truth, prefix=name)
    with pytest.raises(LabelsError, match=r"first.*second"):
        bring("fkd", place, few, tmp_path / "store", classes=1000)


def test_names_with_dots_find_their_labels(tmp_path, few):
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    place = foreign.write_fkd(tmp_path / "labels", truth)
    made = bring("fkd", place, few, tmp_path / "store")
    agree(content(made.store), truth)
    out = send("fkd", made.store, tmp_path / "out")
    assert any("first dot" in note for note in out.notes)
    for key in truth:  # the trainer finds every label where it looks for it
        path = tmp_path / "out" / (foreign.fkd_loader_key(f"/data/train/{key}") + ".tar")
        assert path.is_file()
    agree(content(bring("fkd", tmp_path / "out", few, tmp_path / "again").store), truth)


def test_images_that_share_a_name_are_told_apart_or_left_out(tmp_path, few, cut):
    few = shutil.copytree(few, tmp_path / "few")
    cut(5, 50, 60).save(few / "train" / "a" / "i0.png")
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    place = foreign.write_fkd(tmp_path / "labels", truth)
    made = bring("fkd", place, few, tmp_path / "store")
    assert made.failed == {"ambiguous-label": 2}
    whole = tmp_path / "whole"
    for key, entry in truth.items():
        (whole / key).parent.mkdir(parents=True, exist_ok=True)
        torch.save(foreign.fkd_state(entry, label="marginal"), whole / f"{key}.tar")
    agree(content(bring("fkd", whole, few, tmp_path / "s2").store), truth)


def test_missing_broken_and_extra_files_are_listed(tmp_path, few, caplog):
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    truth["b/i1.jpg"]["box"][1] = [30, 0, 40, 10]  # beyond the lower border
    truth["b/i2.jpg"]["prob"][0] = [0.9, 0.3, 0.1]
    truth["b/i3.jpg"]["prob"][1, 2] = np.nan
    truth["b/i4.jpg"]["ids"][1] = [2, 2, 0]
    place = foreign.write_fkd(tmp_path / "labels", truth)
    labels = place / "train"
    (labels / "a" / "i0.tar").unlink()
    data = (labels / "a" / "i1.tar").read_bytes()
    (labels / "a" / "i1.tar").write_bytes(data[: len(data) // 2])
    (labels / "a" / "unknown.tar").write_bytes(data)
    (labels / "z").mkdir()
    (labels / "z" / "far.tar").write_bytes(data)
    with caplog.at_level("WARNING", logger="fkdpipe"):
        made = bring("fkd", place, few, tmp_path / "store")
    assert made.failed == {"no-label": 1, "broken-label": 4, "box-outside": 1}
    assert "a/unknown.tar" in caplog.text
    assert "z/far.tar" in caplog.text
    assert "a/i0.jpg: no-label" in " ".join(made.examples)
    store = open_store(tmp_path / "store")
    codes = {
        str(store.images.keys[row]): code
        for part in ("rounds/0/crops", "rounds/0/labels/fkd")
        for row, (code, _) in store.sealed(store.part(part)).failed.items()
    }
    assert codes["b/i1.jpg"] == "box-outside"
    assert len(codes) == 6
    sound = {key: entry for key, entry in truth.items() if key not in codes}
    agree(content(store), sound)
    thinned = tmp_path / "thin"
    made = CliRunner().invoke(cli, ["thin", str(tmp_path / "store"), str(thinned), "--crops", "1"])
    assert made.exit_code == 0, made.output
    assert verify.verify(open_store(thinned), full=True) == []


def test_a_hostile_file_is_left_out_and_nothing_runs(tmp_path, few):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    place = foreign.write_fkd(tmp_path / "labels", truth)
    torch.save([Runs()], place / "train" / "a" / "i0.tar")
    made = bring("fkd", place, few, tmp_path / "store")
    assert made.failed == {"unsafe-label": 1}
    assert not (tmp_path / "ran").exists()


def test_the_wrong_folder_is_refused(tmp_path, few, folder):
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    place = foreign.write_fkd(tmp_path / "labels", truth)
    with pytest.raises(LabelsError, match="no label file"):
        bring("fkd", place, folder, tmp_path / "store")
    for c in ("b", "c"):
        shutil.rmtree(place / "train" / c)
    with pytest.raises(LabelsError, match="have no label file below"):
        bring("fkd", place, few, tmp_path / "store")
    with pytest.raises(LabelsError, match="no such folder"):
        bring("fkd", tmp_path / "nowhere", few, tmp_path / "store")


def test_resized_images_are_noticed_by_their_float16_free_boxes(tmp_path, few):
    """Fractions hide a resized copy; pixel boxes that leave the image do not."""
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    for entry in truth.values():
        entry["size"] = entry["size"] // 2
    place = foreign.write_fkd(tmp_path / "labels", truth)
    with pytest.raises(LabelsError, match="box-outside"):
        bring("fkd", place, few, tmp_path / "store")


def test_more_classes_than_folders_ask_for_their_number(tmp_path, few):
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    truth["c/i5.jpg"]["ids"][1, 2] = 1234
    place = foreign.write_fkd(tmp_path / "labels", truth)
    with pytest.raises(LabelsError, match=r"c/i5.jpg names class 1234 of 3.*--classes"):
        bring("fkd", place, few, tmp_path / "store")


def test_crops_take_the_first_and_unequal_numbers_are_told(tmp_path, few):
    truth = foreign.make_truth(images.scan(few), crops=4, k=3, classes=3)
    for name in ("flip", "box", "ids", "prob"):
        truth["a/i2.jpg"][name] = truth["a/i2.jpg"][name][:3]
    place = foreign.write_fkd(tmp_path / "labels", truth)
    assert bring("fkd", place, few, tmp_path / "all").failed == {"other-crops": 1}
    made = bring("fkd", place, few, tmp_path / "three", crops=3)
    assert not made.failed
    for entry in truth.values():
        for name in ("flip", "box", "ids", "prob"):
            entry[name] = entry[name][:3]
    agree(content(made.store), truth)


def test_an_import_never_goes_onto_a_store_of_other_images(tmp_path, few):
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    place = foreign.write_fkd(tmp_path / "labels", truth)
    kept = bring("fkd", place, few, tmp_path / "store")
    before = content(kept.store)
    other = tmp_path / "other"
    shutil.copytree(few, other)
    (other / "train" / "a" / "i0.jpg").rename(other / "train" / "a" / "j0.jpg")
    with pytest.raises(StoreMismatchError, match="labels of other images"):
        bring("fkd", place, other, tmp_path / "store")
    agree(content(open_store(tmp_path / "store")), before)


def test_an_import_goes_on_where_it_was_stopped(tmp_path, few, monkeypatch):
    monkeypatch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 4)
    monkeypatch.setattr("fkdpipe.storage.schema.CHUNK_IMAGES", 2)
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    place = foreign.write_fkd(tmp_path / "labels", truth)
    whole = bring("fkd", place, few, tmp_path / "whole")
    assert (whole.made, whole.kept) == (5, 0)
    seen = []

    def killed(unit, *args):
        seen.append(unit.number)
        if unit.number == 3:
            raise KeyboardInterrupt
        return commit(unit, *args)

    commit = importing._Unit.commit
    monkeypatch.setattr(importing._Unit, "commit", killed)
    with pytest.raises(KeyboardInterrupt, match="3 of 5 units committed and kept"):
        bring("fkd", place, few, tmp_path / "store")
    monkeypatch.setattr(importing._Unit, "commit", commit)
    made = bring("fkd", place, few, tmp_path / "store")
    assert (made.made, made.kept) == (2, 3)
    a, b = (pipeline.arrays_of(s.store) for s in (whole, made))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_other_labels_do_not_slip_into_a_store(tmp_path, few):
    folder = images.scan(few)
    first = foreign.make_truth(folder, crops=2, k=3, classes=3)
    other = foreign.make_truth(folder, crops=2, k=3, classes=3, seed=1)
    place = foreign.write_fkd(tmp_path / "labels", first)
    bring("fkd", place, few, tmp_path / "store")
    elsewhere = foreign.write_fkd(tmp_path / "other", other)
    with pytest.raises(StoreMismatchError, match="other settings"):
        bring("fkd", elsewhere, few, tmp_path / "store", source="second")


def test_unknown_facts_are_recorded_as_unknown_and_known_ones_kept(tmp_path, few):
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    place = foreign.write_fkd(tmp_path / "labels", truth)
    store = bring("fkd", place, few, tmp_path / "store").store
    settings = store.part("rounds/0/labels/fkd").settings
    assert settings.temperature is None
    assert settings.replay is None
    assert settings.teachers == ({"name": None},)
    assert store.rounds()[0].settings.name == "imported:fkd"
    store = bring("fkd", place, few, tmp_path / "s2", temperature=2.0, teacher="timm/big:x").store
    settings = store.part("rounds/0/labels/timm-big-x").settings
    assert settings.temperature == 2.0
    assert settings.teachers == ({"name": "timm/big:x"},)


def test_fkd_reads_what_is_exported_to_it(tmp_path, few):
    """As its trainer does: torch.load, fractions of the image, dense labels by its rule."""
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    place = foreign.write_fkd(tmp_path / "labels", truth)
    store = bring("fkd", place, few, tmp_path / "store").store
    made = send("fkd", store, tmp_path / "out", keep=2)
    assert made.files == len(truth)
    assert any("K = 5 and 10" in note for note in made.notes)
    assert any("temperature" in note for note in made.notes)
    for key, entry in truth.items():
        name = foreign.fkd_loader_key(f"/data/imagenet/train/{key}")
        coords, flip, label = torch.load(tmp_path / "out" / f"{name}.tar", weights_only=True)
        H, W = entry["size"]
        pixels = np.rint(coords.numpy().astype(float) * [H, W, H, W]).astype(int)
        np.testing.assert_array_equal(pixels, entry["box"])
        np.testing.assert_array_equal(flip.numpy(), entry["flip"])
        assert label.dtype == torch.float32
        np.testing.assert_array_equal(label[:, 0].numpy(), entry["ids"][:, :2])
        dense = foreign.fkd_dense(label[0].numpy(), "marginal_smoothing", 3)
        assert abs(dense.sum() - 1) < 1e-6
    with pytest.raises(LabelsError, match="not empty"):
        send("fkd", store, tmp_path / "out")
    with pytest.raises(UsageError, match="holds 3 classes"):
        send("fkd", store, tmp_path / "new", keep=4)


@pytest.mark.parametrize("form", ["full", "logits", "topk:3:compact", "hard"])
def test_every_form_of_ours_can_be_written_and_comes_back(tmp_path, folder, teacher, form):
    store = pipeline.make_store(tmp_path / "store", folder, [teacher], form=form, crops=5)
    keep = None if form in ("hard", "topk:3:compact") else 5
    made = send("fkd", store, tmp_path / "out", keep=keep)
    assert made.files == len(store.images) - len(made_failures(store))
    assert any("deeper" in note or "other folders" in note for note in made.notes)
    back = bring("fkd", tmp_path / "out", folder, tmp_path / "back")
    agree(content(back.store), content(store, keep=keep), tolerance=2.0**-10)


def made_failures(store) -> set[int]:
    return {r for _, m in store.markers(store.part("rounds/0/labels/t")) for r in m.failed}


def test_the_commands_say_what_they_did(tmp_path, few):
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    place = foreign.write_fkd(tmp_path / "labels", truth)
    (place / "train" / "a" / "i0.tar").unlink()
    run = CliRunner()
    words = ["import", "fkd", str(place), str(few), str(tmp_path / "store")]
    made = run.invoke(cli, [*words, "--json"])
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert (found["images"], found["failed"]) == (len(truth), {"no-label": 1})
    again = run.invoke(cli, words)
    assert "0 units made, 1 kept" in again.stdout
    assert again.stdout.endswith("The labels are stored as source fkd.\n")
    named = run.invoke(cli, [*words, "--source-name", "t"])
    assert named.stdout.endswith("The labels are stored as source t; the store also has fkd.\n")
    made = run.invoke(
        cli, ["export", "fkd", str(tmp_path / "store"), str(tmp_path / "out"), "--source", "t"]
    )
    assert made.exit_code == 0, made.output
    assert f"in {len(truth) - 1} files" in made.stdout
    assert "note: " in made.stdout
    wrong = run.invoke(cli, ["import", "excel", str(place), str(few), str(tmp_path / "store")])
    assert wrong.exit_code == 2
    assert "fkd" in wrong.stderr
    wrong = run.invoke(cli, [*words, "--keep", "3"])
    assert wrong.exit_code == 2
    assert "--keep does not apply to fkd, only to relabel" in wrong.stderr


def test_float16_boxes_that_leave_the_image_by_rounding_are_moved_back_and_counted():
    random = np.random.default_rng(0)
    H, W = 2448, 3264
    h, w = random.integers(1, H + 1, 20_000), random.integers(1, W + 1, 20_000)
    exact = np.stack([H - h, W - w, h, w], axis=1)  # all touch the lower right corner
    fraction = (exact / [H, W, H, W]).astype(np.float16)
    box, moved = to_pixels(fraction, (H, W))
    plain = np.rint(fraction.astype(float) * [H, W, H, W])
    outside = ((plain[:, 0] + plain[:, 2] > H) | (plain[:, 1] + plain[:, 3] > W)).sum()
    assert moved == outside > 1000
    assert (box[:, 0] + box[:, 2] <= H).all()
    assert (box[:, 1] + box[:, 3] <= W).all()
    assert np.abs(box - exact).max() <= 3
    box, moved = to_pixels((exact / [H, W, H, W]).astype(np.float32), (H, W))
    assert moved == 0
    np.testing.assert_array_equal(box, exact)
