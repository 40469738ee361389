"""The feed: pixels and labels of the right crops, replaced by name when a file breaks."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import CLASSES
from pipeline import CPU, make_store, prepare_run, train_settings

from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import FkdpipeError, StoreMismatchError, TrainingError, UsageError
from fkdpipe.labelgen import generate, plan
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks import models, teachers
from fkdpipe.networks.models import ModelSpec
from fkdpipe.pixels import images
from fkdpipe.pixels.replay import View, normalise
from fkdpipe.storage import labels, reader
from fkdpipe.storage.labels import Target
from fkdpipe.storage.location import open_location
from fkdpipe.train import loop
from fkdpipe.train.feed import Feed
from fkdpipe.train.labelled_crops import LabelledCrops
from fkdpipe.train.order import Order
from fkdpipe.train.schedule import stages
from fkdpipe.train.stored import DenseLabels

M = 4


@pytest.fixture(scope="module", params=["cpu", "dali"])
def taught(request, tmp_path_factory, folder, checkpoint):
    """A store, and every tensor its teacher was fed, by (row, crop): through the public path."""
    place = tmp_path_factory.mktemp(request.param)
    (teacher,) = teachers.load_teachers(
        [ModelSpec("test_resnet", "timm", checkpoint)], class_names=CLASSES, device=CPU
    )
    fed: list[torch.Tensor] = []
    teacher.module.register_forward_pre_hook(lambda module, args: fed.append(args[0].clone()))
    settings = GenerateSettings(
        teacher=("t",), crops=M, source="t", form="full", replay=request.param
    )
    planned = plan.prepare(open_location(place / "store"), folder, settings, [teacher], device=CPU)
    generate.generate(planned, [teacher], generate.Resources(device=CPU, batch=13))
    tensors = torch.cat(fed)
    assert len(tensors) == planned.store.num_images * M
    return request.param, planned.store, tensors.unflatten(0, (-1, M))


@pytest.mark.parametrize(
    ("m", "batch", "threads", "seed"), [(1, 10, 1, 0), (2, 8, 3, 1), (4, 28, 2, 2), (4, 4, 2, 3)]
)
def test_the_student_sees_bit_for_bit_what_the_teacher_was_fed(
    taught, tmp_path, folder, m, batch, threads, seed
):
    """Every odd kind of file, both backends, any batch size, order, m and thread count."""
    backend, store, fed = taught
    settings = train_settings(
        crops_per_image=m, batch_size=batch, threads=threads, seed=seed, replay=backend
    )
    run = prepare_run(tmp_path / "run", folder, store, settings)
    seen = set()
    for batch_ in run.crops.stream():
        pixels = batch_.pixels
        rows, crops = batch_.rows, batch_.crops
        assert torch.equal(pixels, fed[rows, crops])
        assert not torch.equal(pixels, fed[rows, (crops + 1) % M])  # off by one
        assert not torch.equal(pixels.flip(-1), fed[rows, crops])  # a dropped flip
        if len(set(rows.tolist())) > 1:
            assert not torch.equal(pixels, fed[rows.roll(m), crops])  # two images exchanged
        seen |= set(zip(rows.tolist(), crops.tolist(), strict=True))
    assert len(seen) == store.num_images * M


def test_every_kind_of_file_took_part(taught):
    _, store, _ = taught
    names = {key.rsplit("/", 1)[-1] for key in store.images.keys}
    assert {"rotated.jpg", "gray.jpg", "cmyk.jpg", "colour.png", "picture.webp"} <= names


@pytest.mark.parametrize("form", ["topk:3", "full", "logits"])
def test_labels_travel_with_their_crops(tmp_path, folder, teacher, form):
    store = make_store(tmp_path / "store", folder, [teacher], form=form)
    target = Target("marginal-smoothing", 2)
    run = prepare_run(tmp_path / "run", folder, store, train_settings(target=str(target)))
    expected = _all_labels(store, target, tmp_path)
    for batch in run.crops.stream():
        assert np.allclose(batch.labels, expected[batch.rows, batch.crops], atol=1e-6)
        assert torch.equal(batch.classes, torch.from_numpy(store.images.class_N)[batch.rows].long())


def _all_labels(store, target, tmp_path) -> np.ndarray:
    """(N, M, C) by the slow way: whole arrays, numpy."""
    import zarr

    part = store.part("rounds/0/labels/t")
    form = part.settings.form

    def read(name):
        return zarr.open_array(store=store.url, path=f"{part.path}/{name}", mode="r")[:]

    if not form.sparse:
        scores = read(form.value_field)
        flat = labels.dense_target(target, labels.softmax(scores.reshape(-1, len(CLASSES))))
    else:
        prob = labels.decode_probabilities(form, read("prob").reshape(-1, form.k))
        ids = read("ids").reshape(-1, form.k)
        flat = labels.to_dense(labels.sparse_target(target, ids, prob, len(CLASSES)), len(CLASSES))
    return flat.reshape(store.num_images, -1, len(CLASSES))


def feed_of(run, *, rank: Rank = Rank(), order: Order | None = None) -> LabelledCrops:
    """The batches that a process of a run has, or those of another order."""
    feed = run.feed
    other = Feed(
        feed.data,
        order or feed.order,
        feed.views,
        backend=feed.backend,
        threads=2,
        device=CPU,
        rank=rank,
    )
    return LabelledCrops.of(other, [run.student.preprocessing])


def test_two_processes_split_each_step_of_one(tmp_path, folder, teacher):
    store = make_store(tmp_path / "store", folder, [teacher])
    settings = train_settings(batch_size=16)
    run = prepare_run(tmp_path / "a", folder, store, settings)
    alone = list(run.crops.stream())
    shares = [list(feed_of(run, rank=Rank(k, 2)).stream()) for k in range(2)]
    assert len(alone) == len(shares[0]) == len(shares[1])
    for whole, first, second in zip(alone, *shares, strict=True):
        assert torch.equal(whole.pixels, torch.cat([first.pixels, second.pixels]))
        assert torch.equal(whole.rows, torch.cat([first.rows, second.rows]))
        assert first.total == second.total == whole.total == len(whole.rows)


def test_a_process_without_a_share_goes_along_without_weight(tmp_path, folder, teacher):
    store = make_store(tmp_path / "store", folder, [teacher])
    count = store.num_images  # 51: 12 steps of 4 images a pass, and 3 left for 4 processes
    settings = train_settings(epochs=1, crops_per_image=1, batch_size=4)
    run = prepare_run(tmp_path / "run", folder, store, settings)
    last = [list(feed_of(run, rank=Rank(k, 4)).stream()) for k in range(4)]
    assert count % 4 == 3
    assert sorted(batches[-1].total for batches in last) == [0, 3, 3, 3]
    assert all(len(batches[-1].rows) == 1 for batches in last)


def test_a_file_that_breaks_in_mid_run_is_replaced_by_name(tmp_path, folder, teacher, caplog):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    store = make_store(tmp_path / "store", data, [teacher])
    run = prepare_run(tmp_path / "run", data, store, train_settings())
    victim = str(store.images.keys[7])
    file = images.path_of(data / "train", victim)
    os.truncate(file, 700)
    for batch in run.crops.stream():
        assert 7 not in batch.rows.tolist()
        assert len(batch.rows) == batch.total
        assert batch.pixels.flatten(2).std(2).min() > 0  # no empty rows
    assert set(run.feed.failed) == {victim}
    assert caplog.text.count(f"{victim} is replaced") == 1


def test_a_share_of_one_broken_image_goes_along_without_weight(tmp_path, folder, teacher, caplog):
    """Nothing is there to replace it by, and the run would stop at this step again and again."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    store = make_store(tmp_path / "store", data, [teacher])
    settings = train_settings(epochs=2, batch_size=2)  # of one image
    run = prepare_run(tmp_path / "run", data, store, settings)
    os.truncate(images.path_of(data / "train", store.images.keys[7]), 700)
    whole = {}
    for batch in run.crops.stream():
        whole[7 in batch.rows.tolist()] = batch
        assert batch.total == (0 if 7 in batch.rows.tolist() else 2)
    p = run.student.preprocessing
    black = normalise(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), p.mean, p.std)
    assert torch.equal(whole[True].pixels, black)
    assert not whole[True].labels.any()
    assert set(run.feed.failed) == {str(store.images.keys[7])}
    loss, _ = loop.step(run, whole[True])
    assert float(loss) == 0.0
    assert not any(p.grad.any() for p in run.learner.parameters() if p.grad is not None)


@pytest.mark.parametrize("damage", ["cut", "gone", "resized"])
def test_a_single_crop_of_a_broken_file_is_replaced_by_name(
    tmp_path, folder, teacher, caplog, capfd, damage
):
    """With one crop per image only its region is decoded; a broken file shows all the same."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    store = make_store(tmp_path / "store", data, [teacher])
    run = prepare_run(tmp_path / "run", data, store, train_settings(crops_per_image=1))
    row = next(r for r, key in enumerate(store.images.keys) if key.endswith("/3.jpg"))
    file = images.path_of(data / "train", store.images.keys[row])
    if damage == "cut":
        os.truncate(file, os.path.getsize(file) - 2)
    elif damage == "gone":
        os.remove(file)
    else:
        shutil.copy(images.path_of(data / "train", store.images.keys[row - 1]), file)
    for batch in run.crops.stream():
        assert row not in batch.rows.tolist()
        assert len(batch.rows) == batch.total
    assert set(run.feed.failed) == {str(store.images.keys[row])}
    capfd.readouterr()


def test_the_first_labels_of_a_pass_are_read_while_the_last_pass_ends(
    tmp_path, folder, teacher, monkeypatch
):
    store = make_store(tmp_path / "store", folder, [teacher], form="full")
    run = prepare_run(tmp_path / "run", folder, store, train_settings(target="full"))
    begun, plain = [], DenseLabels.open

    def watched(labels, units, crops_m):
        begun.append(crops_m.tolist())
        return plain(labels, units, crops_m)

    monkeypatch.setattr(DenseLabels, "open", watched)
    stream = run.crops.stream()
    first = next(stream)
    assert len(first.rows) < 2 * len(run.feed.data.rows)  # far from the end of the pass
    stream.close()
    assert begun == [[0, 1], [2, 3]]


def test_labels_of_a_replacement_are_its_own(tmp_path, folder, teacher):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    store = make_store(tmp_path / "store", data, [teacher])
    target = Target("marginal-smoothing", 3)
    expected = _all_labels(store, target, tmp_path)
    run = prepare_run(tmp_path / "run", data, store, train_settings(target=str(target)))
    for row in (7, 8, 30):
        os.remove(images.path_of(data / "train", store.images.keys[row]))
    for batch in run.crops.stream():
        assert np.allclose(batch.labels, expected[batch.rows, batch.crops], atol=1e-6)


def test_a_disk_that_goes_away_stops_the_run(tmp_path, folder, teacher):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    store = make_store(tmp_path / "store", data, [teacher])
    run = prepare_run(tmp_path / "run", data, store, train_settings())
    shutil.rmtree(data / "train")
    with pytest.raises(TrainingError, match="images could not be read"):
        list(run.crops.stream())


def test_a_resized_copy_of_the_data_is_refused_before_training(tmp_path, folder, teacher):
    from PIL import Image

    store = make_store(tmp_path / "store", folder, [teacher])
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    for file in (data / "train").rglob("*.*"):
        with Image.open(file) as image:
            image.convert("RGB").resize((image.width // 2, image.height // 2)).save(
                file, image.format
            )
    with pytest.raises(StoreMismatchError, match="recorded"):
        prepare_run(tmp_path / "run", data, store, train_settings())


def test_another_class_list_is_refused(tmp_path, folder, teacher):
    store = make_store(tmp_path / "store", folder, [teacher])
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    (data / "train" / "ash").rename(data / "train" / "oak")
    with pytest.raises(StoreMismatchError, match=r"missing 1 \(ash\); unknown 1 \(oak\)"):
        prepare_run(tmp_path / "run", data, store, train_settings())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crops_per_image": 8, "batch_size": 16}, "the store records 4"),
        ({"target": "full"}, "cannot serve target full"),
        ({"target": "marginal-smoothing:4"}, "it serves hard"),
        ({"source": "other"}, "it has t"),
        ({"label_temperature": 3.0}, "made at temperature 1"),
    ],
)
def test_what_a_store_cannot_serve_is_refused_before_training(
    tmp_path, folder, teacher, change, words
):
    store = make_store(tmp_path / "store", folder, [teacher])
    with pytest.raises(FkdpipeError, match=words):
        prepare_run(tmp_path / "run", folder, store, train_settings(**change))


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, folder, teacher):
    store = make_store(tmp_path / "store", folder, [teacher])
    with pytest.raises(UsageError, match="must be a multiple of 2 crops per image x 3 processes"):
        prepare_run(tmp_path / "run", folder, store, train_settings(), rank=Rank(0, 3))


def test_images_without_labels_are_left_out(tmp_path, folder, teacher, capfd):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    victim = data / "train" / "ash" / "0.jpg"
    os.truncate(victim, victim.stat().st_size * 2 // 3)
    store = make_store(tmp_path / "store", data, [teacher])
    found = reader.finished(store, [("labels", "t", "")])
    run = prepare_run(tmp_path / "run", data, store, train_settings())
    rows = {row for batch in run.crops.stream() for row in batch.rows.tolist()}
    assert rows == set(found.rows.tolist())
    assert len(rows) == store.num_images - 1
    capfd.readouterr()


def spread_crops(run, *, rank: Rank = Rank(), m=2, batch=16, epochs=4) -> LabelledCrops:
    """The crops of a run, spread over batches."""
    order = Order(
        run.feed.data.rows,
        unit_size=run.feed.data.unit_size,
        window=8,
        stages=stages(epochs, m),
        batch_size=batch,
        seed=0,
        independent=True,
    )
    return feed_of(run, rank=rank, order=order)


@pytest.mark.parametrize("form", ["topk:3", "full"])
def test_spread_batches_hold_the_same_crops_with_their_own_labels(tmp_path, folder, teacher, form):
    store = make_store(tmp_path / "store", folder, [teacher], form=form)
    target = Target("marginal-smoothing", 3)
    run = prepare_run(tmp_path / "run", folder, store, train_settings(target=str(target)))
    together = {}
    for batch in run.crops.stream():
        for place, key in enumerate(zip(batch.rows.tolist(), batch.crops.tolist(), strict=True)):
            together[key] = batch.pixels[place].clone()
    expected = _all_labels(store, target, tmp_path)
    seen = []
    for number, batch in enumerate(spread_crops(run).stream()):
        rows, crops = batch.rows.tolist(), batch.crops.tolist()
        assert (batch.step, batch.m, batch.total) == (number, 1, len(rows))
        assert len(set(rows)) == len(rows)
        assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
        for place, key in enumerate(zip(rows, crops, strict=True)):
            assert torch.equal(batch.pixels[place], together[key])
        assert np.allclose(batch.labels, expected[rows, crops], atol=1e-6)
        seen += zip(rows, crops, strict=True)
    assert len(seen) == len(together)
    assert set(seen) == set(together)


def test_a_spread_run_resumes_at_any_step_and_splits_over_processes(tmp_path, folder, teacher):
    store = make_store(tmp_path / "store", folder, [teacher])
    run = prepare_run(tmp_path / "run", folder, store, train_settings())
    crops_ = spread_crops(run, m=4)
    whole = [(b.rows, b.crops, b.pixels.clone()) for b in crops_.stream()]
    assert len(whole) == len(crops_.feed.order) == 16
    for start in (1, 4, 6, 15):
        rest = list(crops_.stream(start))
        assert [batch.step for batch in rest] == list(range(start, 16))
        for batch, (rows, crops, pixels) in zip(rest, whole[start:], strict=True):
            assert torch.equal(batch.rows, rows)
            assert torch.equal(batch.crops, crops)
            assert torch.equal(batch.pixels, pixels)
    shares = [list(spread_crops(run, rank=Rank(k, 2), m=4).stream()) for k in range(2)]
    for (rows, crops, pixels), *ours in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([batch.rows for batch in ours]), rows)
        assert torch.equal(torch.cat([batch.crops for batch in ours]), crops)
        assert torch.equal(torch.cat([batch.pixels for batch in ours]), pixels)
        assert {batch.total for batch in ours} == {len(rows)}


def test_fresh_crops_need_no_store(tmp_path, folder):
    settings = train_settings(target="ground-truth", epochs=4)
    run = prepare_run(tmp_path / "run", folder, None, settings)
    crops: dict[int, list[int]] = {}
    for batch in run.crops.stream():
        assert torch.equal(batch.labels, torch.eye(len(CLASSES))[batch.classes])
        for row, crop in zip(batch.rows.tolist(), batch.crops.tolist(), strict=True):
            crops.setdefault(row, []).append(crop)
    assert len(crops) == len(run.feed.data.rows)
    assert all(drawn == [0, 1, 2, 3] for drawn in crops.values())


def test_views_of_the_student_follow_its_preprocessing(tmp_path, folder):
    settings = train_settings(target="ground-truth", size=None, interpolation="bicubic")
    run = prepare_run(tmp_path / "run", folder, None, settings)
    assert isinstance(run.crops, LabelledCrops)
    own = models.build(ModelSpec("test_resnet"), pretrained=False).preprocessing
    assert run.feed.views[0] == View(own.size, "bicubic")
