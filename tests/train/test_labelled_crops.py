"""The public dataset: the batches of the trainer, an epoch at a time, from any state on."""

from __future__ import annotations

import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import CLASSES, load_teacher
from pipeline import CPU, arrays_of, make_store, prepare_run, train_settings
from torch.utils.data import DataLoader

from fkdpipe.common.errors import FkdpipeError, StoreMismatchError, UsageError
from fkdpipe.networks.feature_layers import Needs
from fkdpipe.pixels import images
from fkdpipe.pixels.replay import normalise
from fkdpipe.storage.labels import Target
from fkdpipe.train.labelled_crops import IMAGENET_MEAN, IMAGENET_STD, LabelledCrops

TARGET = "marginal-smoothing:3"


@pytest.fixture(scope="module")
def store(tmp_path_factory, folder, checkpoint):
    place = tmp_path_factory.mktemp("stores") / "store"
    teacher = load_teacher(checkpoint, needs=Needs(penultimate=True))
    return make_store(place, folder, [teacher], features=("post",))


@pytest.fixture
def opened(store, folder, tmp_path):
    """LabelledCrops with small numbers."""

    def make(**changes) -> LabelledCrops:
        settings = {"target": TARGET, "size": 32, "batch_size": 16, "crops_per_image": 2}
        settings |= {"threads": 2, "cache": tmp_path / "cache", "device": "cpu", **changes}
        source = settings.pop("store", store)
        return LabelledCrops(source, settings.pop("images", folder), **settings)

    return make


def same(a, b) -> bool:
    return (
        torch.equal(a.pixels, b.pixels)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.classes, b.classes)
        and a.keys == b.keys
        and torch.equal(a.crops, b.crops)
        and a.step == b.step
    )


def test_batches_are_the_trainers(opened, store, folder, tmp_path):
    run = prepare_run(tmp_path / "run", folder, store, train_settings(epochs=8))
    p = run.student.preprocessing
    crops = opened(mean=p.mean, std=p.std, interpolation=p.interpolation)
    trained = list(run.crops.stream())
    ours = [batch for _ in range(4) for batch in crops]
    full = [batch for batch in trained if len(batch) == 16]
    assert len(full) >= len(trained) - 1  # of a run that ends, the last batch may be short
    assert all(same(a, b) for a, b in zip(ours, full, strict=False))
    assert len(ours) >= len(full)


def test_what_a_batch_holds(opened, store):
    crops = opened(features="post")
    values = arrays_of(store)
    prob = values["rounds/0/labels/t/prob"].astype(np.float32)
    ids = values["rounds/0/labels/t/ids"]
    stored = values["rounds/0/features/t/post/value"].astype(np.float32)
    for batch in crops:
        assert batch.pixels.shape == (16, 3, 32, 32)
        assert batch.pixels.dtype == torch.float32
        assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
        assert len(batch) == len(batch.keys) == batch.total == 16
        assert batch.labels.shape == (16, len(CLASSES))
        torch.testing.assert_close(batch.labels.sum(1), torch.ones(16))
        assert batch.features.shape == (16, stored.shape[-1])
        for k, (row, crop) in enumerate(
            zip(batch.rows.tolist(), batch.crops.tolist(), strict=True)
        ):
            assert batch.keys[k] == store.images.keys[row]
            assert batch.classes[k] == store.images.class_N[row]
            kept = prob[row, crop] / max(prob[row, crop].sum(), 1)
            for name, p in zip(ids[row, crop], kept, strict=True):
                assert batch.labels[k, int(name)] == pytest.approx(p, abs=1e-6)
            assert torch.equal(batch.features[k], torch.from_numpy(stored[row, crop]))
    assert crops.num_classes == len(CLASSES)
    assert crops.class_names == CLASSES
    assert batch.to("cpu").keys == batch.keys
    assert same(batch.to("cpu"), batch)


def test_pixels_are_normalised_on_the_device_or_left_alone(opened):
    for a, b in zip(opened(), opened(normalize=False), strict=True):
        assert b.pixels.dtype == torch.uint8
        assert torch.equal(a.pixels, normalise(b.pixels, IMAGENET_MEAN, IMAGENET_STD))


@pytest.mark.parametrize("independent", [False, True])
def test_epochs_follow_one_another_in_full_batches(opened, store, independent):
    crops = opened(independent=independent, batch_size=14)
    seen = []
    for epoch in range(4):
        assert crops.epoch == epoch
        expected = len(crops)
        batches = list(crops)
        assert len(batches) == expected
        assert {batch.epoch for batch in batches} == {epoch}
        seen += batches
    assert [batch.step for batch in seen] == list(range(len(seen)))
    assert independent or {len(batch) for batch in seen} == {14}
    drawn = [key for batch in seen for key in zip(batch.keys, batch.crops.tolist(), strict=True)]
    counts = {key: drawn.count(key) for key in set(drawn)}
    assert len(counts) == store.num_images * 4
    assert set(counts.values()) <= {1, 2, 3}  # two rounds of all crops, and a batch beyond
    if independent:
        assert all(len(set(batch.keys)) == len(batch) for batch in seen)
        assert set(counts.values()) == {2}


def test_an_epoch_can_be_chosen_and_repeats_from_its_first_batch(opened):
    crops = opened()
    first, second = list(crops), list(crops)
    crops.set_epoch(0)
    assert all(same(a, b) for a, b in zip(first, crops, strict=True))
    crops.set_epoch(1)
    begun = iter(crops)
    next(begun)
    next(begun)
    crops.set_epoch(1)
    assert all(same(a, b) for a, b in zip(second, crops, strict=True))  # begun again
    with pytest.raises(UsageError, match="from 0 on; found -1"):
        crops.set_epoch(-1)


def test_an_epoch_that_is_broken_off_is_followed_by_the_next(opened):
    """Lightning and the HF Trainer take as many batches of every epoch as the shortest has."""
    crops, whole = opened(), opened()
    for expected in ([*whole], [*whole], [*whole]):
        taken = list(itertools.islice(crops, len(expected) - 1))
        assert crops.epoch == expected[0].epoch
        assert all(same(a, b) for a, b in zip(taken, expected, strict=False))


def epoch_after_epoch(crops):
    while True:
        yield from crops


def global_batches(opened, world, state, count) -> tuple[list, dict]:
    """The next batches of all processes joined, and the state after them."""
    ranks = [opened(rank=k, world_size=world) for k in range(world)]
    if state is not None:
        for crops in ranks:
            crops.load_state_dict(state)
    endless = [epoch_after_epoch(crops) for crops in ranks]
    joined = []
    for _ in range(count):
        shares = [next(stream) for stream in endless]
        joined.append(
            (
                torch.cat([share.pixels for share in shares]),
                torch.cat([share.labels for share in shares]),
                [key for share in shares for key in share.keys],
                torch.cat([share.crops for share in shares]),
            )
        )
    states = [crops.state_dict() for crops in ranks]
    assert all(other == states[0] for other in states)
    return joined, states[0]


def test_a_state_goes_on_with_the_same_global_batches_at_any_world_size(opened):
    whole, _ = global_batches(opened, 1, None, 22)  # 51 images, 8 in a batch: three epochs
    parts, state = [], None
    for world, count in [(1, 5), (2, 9), (1, 4), (4, 4)]:
        batches, state = global_batches(opened, world, state, count)
        state = json.loads(json.dumps(state))
        parts += batches
    assert len(json.dumps(state)) < 1000
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert a[2] == b[2]
        assert torch.equal(a[3], b[3])


def test_a_loaded_state_survives_the_set_epoch_of_a_framework(opened):
    whole, crops = list(opened()), opened()
    stream = iter(crops)
    for _ in range(3):
        next(stream)
    again = opened()
    again.load_state_dict(crops.state_dict())
    again.set_epoch(again.epoch)
    assert all(same(a, b) for a, b in zip(whole[3:], again, strict=True))
    assert again.epoch == 1


def test_a_state_after_the_last_batch_begins_the_next_epoch(opened):
    crops, again = opened(), opened()
    list(crops)
    again.load_state_dict(crops.state_dict())
    assert again.epoch == 1
    assert same(next(iter(again)), next(iter(crops)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed: 0, now 1"),
        ({"batch_size": 8}, "batch_size: 16, now 8"),
        ({"target": "hard"}, "target: marginal-smoothing:3, now hard"),
    ],
)
def test_a_state_of_other_batches_is_refused_by_name(opened, changes, words):
    with pytest.raises(StoreMismatchError, match=words):
        opened(**changes).load_state_dict(opened().state_dict())


def test_it_goes_through_a_data_loader_without_workers(opened):
    plain = list(opened())
    loader = DataLoader(opened(), batch_size=None)
    assert len(loader) == len(plain)
    assert all(same(a, b) for a, b in zip(plain, loader, strict=True))
    with pytest.raises(UsageError, match="num_workers=0"):
        next(iter(DataLoader(opened(), batch_size=None, num_workers=1)))


def test_reading_ahead_goes_on_from_one_epoch_to_the_next(opened, monkeypatch):
    crops = opened()
    starts = []
    plain = crops.feed.stream
    monkeypatch.setattr(crops.feed, "stream", lambda start: starts.append(start) or plain(start))
    for _ in range(3):
        list(crops)
    assert starts == [0]
    crops.close()
    assert next(iter(crops)).epoch == 3
    assert len(starts) == 2


def test_without_a_store_crops_are_fresh_and_the_folder_is_the_truth(opened):
    crops = opened(store=None, target="ground-truth")
    batches = [batch for _ in range(5) for batch in crops]
    assert max(int(batch.crops.max()) for batch in batches) >= 9
    for batch in batches:
        assert torch.equal(batch.labels, torch.eye(len(CLASSES))[batch.classes])
    with pytest.raises(UsageError, match="needs a store"):
        opened(store=None)


def test_a_share_without_any_readable_image_has_no_labels(opened, folder, store, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    crops = opened(images=data, batch_size=2)  # of one image
    os.truncate(images.path_of(data / "train", store.images.keys[7]), 700)
    lost = [batch for batch in crops if 7 in batch.rows.tolist()]
    assert len(lost) == 1
    assert lost[0].total == 0
    assert not lost[0].labels.any()
    assert set(crops.failed) == {str(store.images.keys[7])}


def test_only_the_first_crops_can_be_used(opened):
    crops = opened(crops=3, crops_per_image=1)
    assert {int(c) for _ in range(4) for batch in crops for c in batch.crops} == {0, 1, 2}


def test_a_state_of_other_labels_of_the_same_images_is_refused(
    opened, folder, checkpoint, tmp_path
):
    other = make_store(tmp_path / "other", folder, [load_teacher(checkpoint)], source="other")
    with pytest.raises(StoreMismatchError, match="labels: "):
        opened(store=other).load_state_dict(opened().state_dict())


@pytest.mark.parametrize("state", [None, [1], {}, {"step": "x"}, {"step": -1}, {"step": 4.7}])
def test_a_state_that_is_none_is_refused(opened, state):
    with pytest.raises(UsageError, match="not a state of LabelledCrops"):
        opened().load_state_dict(state)


def test_numbers_of_numpy_are_numbers(opened):
    crops = opened(batch_size=np.int64(16), size=np.int64(32), seed=np.uint8(0))
    assert same(next(iter(crops)), next(iter(opened())))
    json.dumps(crops.state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": "16"}, "batch_size must be a whole number of at least 1; found '16'"),
        ({"batch_size": 16.0}, "batch_size must be a whole number"),
        ({"crops": -1}, "crops must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"threads": 0}, "threads must be a whole number"),
        ({"size": 32.0}, "size must be one side or"),
        ({"size": (32, 32, 3)}, "size must be one side or"),
        ({"mean": (127, 127, 127)}, "mean must be three numbers from 0 to 1"),
        ({"std": (0, 0, 0)}, "std must be three numbers above 0"),
        ({"target": None}, "'None' is not a target"),
        ({"batch_size": 15}, "batch size 15 .* must be a multiple of 2 crops per image"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; found 0"),
        ({"crops_per_image": 8}, "the store records 4"),
        ({"target": "full"}, "cannot serve target full"),
        ({"store": None}, "needs a store"),
        ({"target": "soft"}, "'soft' is not a target"),
        ({"rank": 0}, "rank and world_size go together"),
        ({"rank": 2, "world_size": 2}, "found 2 of 2"),
        ({"device": "tpu"}, "must be auto, cpu, cuda or cuda:N"),
        ({"interpolation": "nearest"}, "interpolation must be bilinear or bicubic"),
        ({"source": "other"}, "it has t"),
    ],
)
def test_what_cannot_be_is_refused(opened, changes, words):
    with pytest.raises(FkdpipeError, match=words):
        opened(**changes)


@pytest.mark.parametrize(("kind", "k"), [("foo", 0), ("marginal-smoothing", 0), ("hard", 1)])
def test_a_target_is_checked_however_it_is_made(kind, k):
    with pytest.raises(UsageError, match="is not a target; the targets are"):
        Target(kind, k)


def test_a_target_can_be_an_object_and_a_size_a_pair(opened):
    crops = opened(target=Target("hard"), size=(24, 40))
    batch = next(iter(crops))
    assert batch.pixels.shape == (16, 3, 24, 40)
    assert torch.equal(batch.labels.sum(1), torch.ones(16))
    assert torch.equal(batch.labels.amax(1), torch.ones(16))
    assert crops.device == CPU
