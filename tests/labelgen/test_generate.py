"""Phase 1: labels are those of the crops, reproducible, resumable; broken images are recorded."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import CLASSES, load_teacher
from pipeline import CPU, arrays_of, make_store

from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import (
    ImagesError,
    ModelError,
    ReplayError,
    StoreError,
    StoreMismatchError,
    UsageError,
)
from fkdpipe.inspect import report
from fkdpipe.labelgen import outputs
from fkdpipe.labelgen import unit as making
from fkdpipe.networks import teachers
from fkdpipe.networks.feature_layers import Needs
from fkdpipe.pixels import images, replay
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.pixels.replay import Request, View, cpu
from fkdpipe.storage import labels, reader, verify
from fkdpipe.storage.labels import Target
from fkdpipe.storage.store import open_store


@pytest.fixture(scope="module")
def full_store(tmp_path_factory, folder, teacher):
    return make_store(tmp_path_factory.mktemp("s") / "store", folder, [teacher], form="full")


def replayed(store, folder, rows, crop, flip_too=False) -> torch.Tensor:
    """uint8 pixels of one crop of some rows, from the stored boxes."""
    listed = store.images
    boxes = arrays_of(store)
    box = boxes["rounds/0/crops/box"][rows][:, [crop]]
    flip = boxes["rounds/0/crops/flip"][rows][:, [crop]] ^ flip_too
    root = images.split_root(folder, "train")
    request = Request(
        paths=[images.path_of(root, key) for key in listed.keys[rows]],
        size_I2=listed.size_N2[rows],
        box_Im4=box,
        flip_Im=flip,
    )
    with replay.open_replay("cpu", [View((32, 32))]) as replayer:
        (pixels,) = replayer.run([request])
        return pixels.views[0].clone()


def teacher_probabilities(teacher, pixels) -> np.ndarray:
    p = teacher.preprocessing
    return teacher.logits(replay.normalise(pixels, p.mean, p.std)).softmax(1).numpy()


@pytest.mark.parametrize("form", ["full", "logits", "topk:3", "topk:3:compact", "hard"])
def test_the_teacher_on_a_replayed_crop_gives_the_stored_label(tmp_path, folder, teacher, form):
    store = make_store(tmp_path / "store", folder, [teacher], form=form)
    parsed = labels.parse_form(form)
    bound = labels.error_bound(parsed, len(CLASSES)) + 1e-4  # batches differ in their last bits
    rows = np.arange(0, store.num_images, 2)
    right = stored_label(store, rows, 1, tmp_path, parsed)
    twin = expected_label(parsed, teacher_probabilities(teacher, replayed(store, folder, rows, 1)))
    assert variation(right, twin).max() <= bound
    for wrong in (
        replayed(store, folder, rows, 2),
        replayed(store, folder, rows, 1, flip_too=True),
        replayed(store, folder, np.roll(rows, 1), 1),
    ):
        other = expected_label(parsed, teacher_probabilities(teacher, wrong))
        share = (variation(right, other) > bound).mean()
        assert share > (0.3 if form != "hard" else 0.1)


def expected_label(form, prob: np.ndarray) -> np.ndarray:
    target = {"full": "full", "logits": "full", "hard": "hard"}.get(form.kind)
    return labels.dense_target(labels.parse_target(target or f"marginal-smoothing:{form.k}"), prob)


def stored_label(store, rows, crop, tmp_path, form) -> np.ndarray:
    found = reader.finished(store, [("labels", "t", "")])
    if form.sparse:
        sparse = reader.SparseReader(store, found.labels[0], tmp_path / "cache")
        target = Target("hard") if form.kind == "hard" else Target("marginal-smoothing", form.k)
        return labels.to_dense(sparse.take(rows, np.array([crop]), target), len(CLASSES))
    name = "log_prob" if form.kind == "full" else "logit"
    wide = reader.WideReader(store, found.labels[0], name)
    whole = np.concatenate([wide.unit(u, np.array([crop])) for u in range(store.num_units)])
    return labels.softmax(whole[rows, 0])


def variation(a, b) -> np.ndarray:
    return 0.5 * np.abs(a - b).sum(1)


def test_two_generations_are_byte_identical(tmp_path, folder, teacher):
    first = make_store(tmp_path / "a", folder, [teacher], form="full")
    second = make_store(tmp_path / "b", folder, [teacher], form="full", threads=1)
    files = {key: first.location.read(key) for key, _ in first.location.list()}
    assert files == {key: second.location.read(key) for key, _ in second.location.list()}


def small_units(monkeypatch):
    """Several units even of 51 images."""
    monkeypatch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 16)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_make_the_same_store(tmp_path, folder, teacher, monkeypatch, world):
    small_units(monkeypatch)
    alone = make_store(tmp_path / "alone", folder, [teacher], form="full")
    for index in reversed(range(1, world)):  # any order, once the list exists
        if not (tmp_path / "shared").exists():
            make_store(tmp_path / "shared", folder, [teacher], form="full", rank=Rank(0, world))
            partly = open_store(tmp_path / "shared")
            assert partly.manifest(partly.part("rounds/0/labels/t")) is None
        make_store(tmp_path / "shared", folder, [teacher], form="full", rank=Rank(index, world))
    together = open_store(tmp_path / "shared")
    assert alone.num_units == 4
    assert together.manifest(together.part("rounds/0/labels/t")) is not None
    expected = arrays_of(alone)
    for name, values in arrays_of(together).items():
        assert np.array_equal(values, expected[name], equal_nan=values.dtype.kind == "f"), name


def test_another_batch_size_changes_labels_within_the_bound_and_nothing_else(
    tmp_path, folder, teacher, full_store
):
    other = make_store(tmp_path / "store", folder, [teacher], form="full", batch=7)
    expected = arrays_of(full_store)
    for name, values in arrays_of(other).items():
        if name.endswith("log_prob"):
            a, b = (labels.softmax(v.reshape(-1, 5)) for v in (values, expected[name]))
            assert variation(a, b).max() <= 2 * labels.error_bound(labels.Form("full"), 5)
        else:
            assert np.array_equal(values, expected[name]), name


def test_a_run_that_stopped_goes_on_with_the_units_that_are_missing(
    tmp_path, folder, teacher, monkeypatch, full_store
):
    small_units(monkeypatch)
    whole = make_store(tmp_path / "whole", folder, [teacher], form="full")
    plain = making.Unit._commit
    done = []

    def stop_after_two(self, *args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(self.number)
        return plain(self, *args)

    monkeypatch.setattr(making.Unit, "_commit", stop_after_two)
    with pytest.raises(KeyboardInterrupt, match=r"2 of [0-9] units committed and kept"):
        make_store(tmp_path / "store", folder, [teacher], form="full")
    monkeypatch.setattr(making.Unit, "_commit", plain)
    stamps = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "store" / "rounds/0/labels/t/log_prob/c").rglob("0")
        if path.is_file()
    }
    made = make_store(tmp_path / "store", folder, [teacher], form="full")
    assert stamps
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert not verify.verify(made, full=True)
    files = {key: whole.location.read(key) for key, _ in whole.location.list()}
    assert files == {key: made.location.read(key) for key, _ in made.location.list()}


def test_broken_images_are_recorded_left_out_and_counted(tmp_path, folder, teacher, capfd):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    victims = ["ash/0.jpg", "cedar/3.jpg"]
    for key in victims:
        file = data / "train" / key
        encoded = file.read_bytes()
        file.write_bytes(encoded[: len(encoded) * 2 // 3])
    store = make_store(tmp_path / "store", data, [teacher])
    found = reader.finished(store, [("labels", "t", "")])
    assert {str(store.images.keys[row]) for row in found.failed} == set(victims)
    assert all(code == "unreadable" for code, _ in found.failed.values())
    assert len(found.rows) == store.num_images - 2
    assert report.measure(store).failed == 2
    assert not verify.verify(store, full=True)
    capfd.readouterr()


def test_an_error_of_the_disk_is_not_kept_as_a_broken_image(tmp_path, folder, teacher, monkeypatch):
    monkeypatch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 16)
    plain = cpu._load

    def failing(path: bytes) -> np.ndarray:
        if path.endswith(b"beech/1.jpg"):
            raise OSError(errno.EIO, "Input/output error")
        return plain(path)

    monkeypatch.setattr("fkdpipe.common.disk.RETRY_SECONDS", 0.0)
    with monkeypatch.context() as disk:
        disk.setattr(cpu, "_load", failing)
        with pytest.raises(ReplayError, match=r"beech/1.jpg: .*Input/output error"):
            make_store(tmp_path / "store", folder, [teacher])
    before = open_store(tmp_path / "store")
    made = [marker is not None for _, marker in before.markers(before.part("rounds/0/labels/t"))]
    assert made == [True, True, True, False]
    store = make_store(tmp_path / "store", folder, [teacher])
    assert not reader.finished(store, [("labels", "t", "")]).failed


def test_a_folder_that_goes_away_in_part_is_noticed(tmp_path, folder, teacher):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    store = make_store(tmp_path / "store", data, [teacher])
    for key in store.images.keys[20:32]:
        os.remove(images.path_of(data / "train", key))
    with pytest.raises(ImagesError, match=r"12 of 51 images .* Check that .* is complete"):
        make_store(tmp_path / "store", data, [teacher], crops=6)


def test_the_wrong_folder_is_noticed(tmp_path, folder, teacher):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    store = make_store(tmp_path / "store", data, [teacher])
    for key in store.images.keys:
        os.remove(images.path_of(data / "train", key))
    with pytest.raises(ImagesError, match=r"Check that .* the folder this store was made for"):
        make_store(tmp_path / "store", data, [teacher], crops=6)


def test_several_teachers_are_averaged_at_their_own_sizes(tmp_path, folder, checkpoint, teacher):
    second = load_teacher(checkpoint)
    second = dataclasses.replace(
        second, preprocessing=dataclasses.replace(second.preprocessing, size=(48, 48))
    )
    pair = [dataclasses.replace(teacher, weight=0.75), dataclasses.replace(second, weight=0.25)]
    store = make_store(tmp_path / "store", folder, pair, form="full", temperature=2.0)
    rows = np.arange(8)
    form = labels.Form("full")
    made = stored_label(store, rows, 0, tmp_path, form)
    parts = []
    for one in pair:
        p = one.preprocessing
        with replay.open_replay("cpu", [View(p.size)]) as replayer:
            request = Request(
                paths=[images.path_of(folder / "train", key) for key in store.images.keys[rows]],
                size_I2=store.images.size_N2[rows],
                box_Im4=arrays_of(store)["rounds/0/crops/box"][rows][:, :1],
                flip_Im=arrays_of(store)["rounds/0/crops/flip"][rows][:, :1],
            )
            (pixels,) = replayer.run([request])
        logits = one.logits(replay.normalise(pixels.views[0], p.mean, p.std))
        parts.append(one.weight * (logits / 2).softmax(1).numpy())
    assert variation(made, sum(parts)).max() <= labels.error_bound(form, 5) + 1e-4
    with pytest.raises(UsageError, match="form logits stores one teacher"):
        make_store(tmp_path / "other", folder, pair, form="logits")


def test_other_settings_on_an_existing_store_are_refused(tmp_path, folder, teacher):
    make_store(tmp_path / "store", folder, [teacher], form="topk:3")
    for change, words in [
        ({"form": "topk:2"}, "form: topk:3, now topk:2"),
        ({"temperature": 4.0}, "temperature: 1.0, now 4.0"),
        ({"seed": 9}, "seed: 0, now 9"),
        ({"crop": CropDistribution(flip=0.25)}, r"crop\.flip: 0\.5, now 0\.25\. Leave them out"),
        (
            {"crop": CropDistribution(scale=(0.5, 1))},
            r"crop\.scale: \(0\.08, 1\.0\), now \(0\.5, 1\.0\)",
        ),
        ({"crops": 2}, "has 4 crops per image, more than the requested 2"),
    ]:
        with pytest.raises(StoreMismatchError, match=words):
            make_store(tmp_path / "store", folder, [teacher], **{"form": "topk:3", **change})
    other = dataclasses.replace(teacher, digest="0" * 64)
    with pytest.raises(StoreMismatchError, match=r"teachers.0.weights"):
        make_store(tmp_path / "store", folder, [other], form="topk:3")
    make_store(tmp_path / "store", folder, [teacher], form="topk:3", batch=5, threads=1)


def test_a_foreign_folder_is_not_written_into(tmp_path, folder, teacher):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="is not empty and holds no store"):
        make_store(tmp_path / "store", folder, [teacher])


def test_k_above_the_classes_is_refused_before_anything_is_written(tmp_path, folder, teacher):
    with pytest.raises(UsageError, match=r"has 5 classes.*topk:5 or less, or full"):
        make_store(tmp_path / "store", folder, [teacher], form="topk:6")
    assert not (tmp_path / "store").exists()


def test_bfloat16_labels_agree_with_float32_roughly(tmp_path, folder, checkpoint, full_store):
    low = load_teacher(checkpoint, precision="bfloat16")
    store = make_store(tmp_path / "store", folder, [low], form="full")
    a, b = (
        labels.softmax(arrays_of(s)["rounds/0/labels/t/log_prob"].reshape(-1, 5))
        for s in (store, full_store)
    )
    assert not np.array_equal(a, b)
    assert variation(a, b).mean() < 0.05


def test_provenance_says_what_made_the_store(full_store, teacher):
    part = full_store.part("rounds/0/labels/t")
    (facts,) = part.settings.teachers
    assert facts["weights"] == teacher.digest
    assert facts["size"] == [32, 32]
    assert part.settings.replay == "cpu"
    assert {"torch", "zarr"} <= set(part.provenance["packages"])
    crops = full_store.part("rounds/0/crops").settings
    assert (crops.name, crops.version, crops.seed) == ("random-resized-crop", 1, 0)
    assert full_store.marker(part, 0).facts == {
        "batch": 16,
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }


def test_encoding_matches_its_slow_twin():
    z = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)) * 3
    prob = z.softmax(1).numpy()
    made = outputs.encode_labels(labels.parse_form("topk:4"), [z], [1.0], 1.0)
    for row in range(64):
        order = sorted(range(9), key=lambda c: -prob[row, c])[:4]
        hybrid = [order[0], *sorted(order[1:])]
        assert made["ids"][row].tolist() == hybrid
        assert made["prob"][row].tolist() == pytest.approx(
            prob[row][hybrid].tolist(), rel=1e-3, abs=1e-7
        )
    logits = outputs.encode_labels(labels.parse_form("logits"), [z], [1.0], 1.0)
    whole = logits["logit"].astype(np.float32) + logits["logit_max"][:, None]
    assert np.allclose(whole, z.numpy(), atol=2e-2)


def test_averaging_is_of_probabilities():
    z = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
    made = teachers.average(z, [0.25, 0.75], 2.0).exp()
    expected = 0.25 * (z[0] / 2).softmax(1) + 0.75 * (z[1] / 2).softmax(1)
    assert torch.allclose(made, expected, atol=1e-6)


def test_dali_labels_agree_with_cpu_labels_closely(tmp_path, folder, teacher, full_store):
    store = make_store(tmp_path / "store", folder, [teacher], form="full", replay="dali")
    assert store.part("rounds/0/labels/t").settings.replay == "dali"
    a, b = (
        labels.softmax(arrays_of(s)["rounds/0/labels/t/log_prob"].reshape(-1, 5))
        for s in (store, full_store)
    )
    assert np.median(variation(a, b)) < 0.02
    assert CPU.type == "cpu"


@pytest.mark.parametrize("form", ["topk:3", "logits", "none"])
def test_labels_that_are_no_numbers_are_never_committed(tmp_path, folder, checkpoint, form):
    broken = load_teacher(checkpoint, needs=Needs(pre=True))
    with torch.no_grad():
        next(broken.module.parameters())[0, 0, 0, 0] = float("nan")
    features = ("pre",) if form == "none" else ()
    with pytest.raises(ModelError, match=r"test_resnet.* not finite at precision float32"):
        make_store(tmp_path / "store", folder, [broken], form=form, features=features)
    store = open_store(tmp_path / "store")
    parts = [part for part in store.parts.values() if part.kind in ("labels", "features")]
    assert parts
    assert all(store.marker(part, 0) is None for part in parts)


def test_features_that_overflow_are_never_committed(tmp_path, folder, checkpoint):
    """Logits alone would not show it: a classifier may give the channel no weight."""
    wide = load_teacher(checkpoint, needs=Needs(pre=True))
    plain = type(wide).outputs

    class Overflowing(type(wide)):
        def outputs(self, pixels):
            made = plain(self, pixels)
            return dataclasses.replace(made, pre=made.pre * float("inf"))

    teacher = Overflowing(**{f.name: getattr(wide, f.name) for f in dataclasses.fields(wide)})
    with pytest.raises(ModelError, match="not finite"):
        make_store(tmp_path / "store", folder, [teacher], features=("pre",))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 0.0, -1.0])
def test_shares_of_teachers_are_positive_numbers(checkpoint, weight):
    with pytest.raises(UsageError, match="positive numbers"):
        load_teacher(checkpoint, weights=(weight,))
