"""Recorded colour jitter: drawn, stored, and seen alike by teacher and student."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import load_teacher
from oracles import colour_jitter
from pipeline import CPU, arrays_of, make_store, prepare_run, train_settings

from fkdpipe.common import config
from fkdpipe.common.errors import StoreMismatchError, UsageError
from fkdpipe.labelgen import check, outputs
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.pixels import colour, crops, images
from fkdpipe.pixels.crops import CropDistribution, Jitter
from fkdpipe.storage import rounds, verify
from fkdpipe.storage.location import open_location
from fkdpipe.storage.store import open_store
from fkdpipe.storage.thin import Subset, thin
from fkdpipe.train import step

JITTER = Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
IDS = crops.image_ids([f"{k}.jpg" for k in range(500)])
SIZES = np.full((500, 2), (300, 400))


def sample(distribution, which=range(4)):
    made = {"seed": 5, "image_id_N": IDS, "size_N2": SIZES, "crops_M": np.array(which)}
    return crops.sample(distribution, **made)


@pytest.fixture(scope="module")
def pictures(photographs) -> torch.Tensor:
    """uint8 (12, 3, 60, 50): real pieces, one of them gray, one black, one white."""
    pieces = [photographs[k % 2][20 * k : 20 * k + 60, 30 * k : 30 * k + 50] for k in range(12)]
    made = torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2)
    made[1] = made[1, :1]
    made[2], made[3] = 0, 255
    return made.contiguous(memory_format=torch.channels_last)


def some_factors(count: int, seed: int = 0) -> torch.Tensor:
    strong = Jitter(1.0, 1.0, 1.0, 0.5)
    ids = crops.image_ids([str(k) for k in range(count)])
    drawn = crops.sample_jitter(strong, seed=seed, image_id_N=ids, crops_M=np.arange(1))
    return torch.from_numpy(drawn[:, 0])


@pytest.mark.parametrize("only", [None, 0, 1, 2, 3])
def test_pixels_are_those_of_torchvisions_operations(pictures, only):
    """torchvision works in floats from 0 to 1, and takes the mean of contrast in float32: values
    that fall on a half may round the other way, by one level."""
    factor = some_factors(len(pictures))
    if only is not None:
        kept = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(len(pictures), 1)
        kept[:, only] = factor[:, only]
        factor = kept
    ours = colour.jitter(pictures, factor)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous(memory_format=torch.channels_last)
    off = 0
    for k, picture in enumerate(pictures):
        expected = colour_jitter(picture, factor[k].tolist())
        difference = (ours[k].int() - expected.int()).abs()
        assert difference.max() <= 1
        off += int((difference > 0).sum())
    assert off < 1e-3 * pictures.numel()
    assert not torch.equal(ours, pictures)


def test_neutral_factors_and_none_change_nothing(pictures):
    neutral = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(len(pictures), 1)
    assert torch.equal(colour.jitter(pictures, neutral), pictures)
    assert colour.jitter(pictures, None) is pictures


def test_a_crops_colours_do_not_depend_on_its_batch(pictures):
    factor = some_factors(len(pictures))
    factor[5, 3] = 0.0
    whole = colour.jitter(pictures, factor)
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(pictures)))
    assert torch.equal(colour.jitter(pictures[order], factor[order]), whole[order])
    for k in range(len(pictures)):
        assert torch.equal(colour.jitter(pictures[k : k + 1], factor[k : k + 1])[0], whole[k])


def test_boxes_and_flips_are_those_of_a_distribution_without_jitter():
    plain, jittered = sample(CropDistribution()), sample(CropDistribution(jitter=JITTER))
    assert plain.jitter_NM4 is None
    assert plain.box_NM4.tobytes() == jittered.box_NM4.tobytes()
    assert plain.flip_NM.tobytes() == jittered.flip_NM.tobytes()


def test_factors_follow_the_distribution_and_nothing_else():
    made = sample(CropDistribution(jitter=JITTER)).jitter_NM4
    assert made.dtype == np.float32
    assert made.shape == (500, 4, 4)
    for k, (centre, strength) in enumerate([(1, 0.4), (1, 0.4), (1, 0.4), (0, 0.1)]):
        drawn = made[..., k].ravel()
        assert centre - strength <= drawn.min() < centre - 0.99 * strength
        assert centre + strength >= drawn.max() > centre + 0.99 * strength
        assert abs(drawn.mean() - centre) < 5 * strength / (3 * drawn.size) ** 0.5
    among = np.corrcoef(made.reshape(-1, 4).T) - np.eye(4)
    assert np.abs(among).max() < 5 / 2000**0.5
    later = sample(CropDistribution(jitter=JITTER), which=[3]).jitter_NM4
    assert np.array_equal(later[:, 0], made[:, 3])
    alone = crops.sample_jitter(JITTER, seed=5, image_id_N=IDS, crops_M=np.arange(4))
    assert np.array_equal(alone, made)


@pytest.mark.parametrize(
    "bad", [{"brightness": -0.1}, {"contrast": 1.5}, {"saturation": 2.0}, {"hue": 0.6}]
)
def test_a_jitter_that_cannot_be_is_refused(bad):
    with pytest.raises(UsageError, match="must be a number from 0 to"):
        Jitter(**bad)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, folder, checkpoint):
    """(plain, with jitter stored, with jitter derived), and what the teacher was fed in the
    second."""
    place = tmp_path_factory.mktemp("jitter")
    taught = load_teacher(checkpoint)
    fed: list[torch.Tensor] = []
    plain = make_store(place / "plain", folder, [taught], form="full")
    handle = taught.module.register_forward_pre_hook(lambda _, args: fed.append(args[0].clone()))
    distribution = CropDistribution(jitter=JITTER)
    stored = make_store(
        place / "stored", folder, [taught], form="full", crop=distribution, batch=13
    )
    handle.remove()
    derived = make_store(
        place / "derived",
        folder,
        [taught],
        form="full",
        crop=distribution,
        boxes="derived",
        batch=13,
    )
    return plain, stored, derived, torch.cat(fed).unflatten(0, (-1, 4))


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize(("m", "batch"), [(1, 10), (4, 8)])
def test_the_student_sees_the_colours_that_the_teacher_saw(
    stores, tmp_path, folder, which, m, batch
):
    fed = stores[3]
    settings = train_settings(crops_per_image=m, batch_size=batch, target="full")
    run = prepare_run(tmp_path / "run", folder, stores[which], settings)
    p = run.student.preprocessing
    for batch_, host in zip(run.crops.stream(), run.feed.stream(), strict=True):
        assert torch.equal(batch_.pixels, fed[batch_.rows, batch_.crops])
        plain = outputs.normalise(host.views[0], p.mean, p.std)
        assert not torch.equal(plain, fed[batch_.rows, batch_.crops])


def test_the_loop_shows_the_student_the_recorded_colours(stores, tmp_path, folder):
    run = prepare_run(tmp_path / "run", folder, stores[1], train_settings(target="full"))
    seen: list[torch.Tensor] = []
    run.learner.student.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    batch = next(run.crops.stream())
    step.step(run, batch)
    assert torch.equal(seen[0], stores[3][batch.rows, batch.crops])


def test_a_recipe_names_the_strengths():
    table = {"teacher": ["t"], "crop": {"jitter": {"brightness": 0.4, "hue": 0.1}}}
    made = config.build(GenerateSettings, table)
    assert made.crop == CropDistribution(jitter=Jitter(brightness=0.4, hue=0.1))
    assert config.build(GenerateSettings, {"teacher": ["t"]}).crop is None


def test_stored_factors_are_those_of_the_distribution(stores):
    plain, stored, derived, _ = stores
    without, values = arrays_of(plain), arrays_of(stored)
    assert set(values) - set(without) == {"rounds/0/crops/jitter"}
    for name in ("rounds/0/crops/box", "rounds/0/crops/flip"):
        assert np.array_equal(values[name], without[name])
    assert not np.array_equal(
        values["rounds/0/labels/t/log_prob"], without["rounds/0/labels/t/log_prob"]
    )
    expected = rounds.draw(stored, stored.rounds()[0], 0)
    assert np.array_equal(values["rounds/0/crops/jitter"], expected.jitter_NM4)
    again = arrays_of(derived)
    assert "rounds/0/crops/jitter" not in again
    for name, labels in again.items():
        if name.startswith("rounds/0/labels"):
            assert np.array_equal(labels, values[name])


def test_a_store_without_jitter_says_nothing_of_it(stores):
    assert "jitter" not in stores[0].rounds()[0].settings.to_json()
    assert stores[1].rounds()[0].settings.jitter.brightness == 0.4


@pytest.mark.parametrize("which", [1, 2])
def test_verify_and_the_teacher_check_know_jitter(stores, folder, checkpoint, which):
    store = stores[which]
    assert not verify.verify(store, full=True)
    part = store.part("rounds/0/labels/t")
    checked = check.teacher(store, part, folder, [load_teacher(checkpoint)], device=CPU)
    assert not checked.problems


def test_the_teacher_check_notices_other_colours(stores, folder, checkpoint, monkeypatch):
    store = stores[1]
    monkeypatch.setattr(colour, "jitter", lambda pixels, factor: pixels)
    part = store.part("rounds/0/labels/t")
    checked = check.teacher(store, part, folder, [load_teacher(checkpoint)], device=CPU)
    assert {problem.code for problem in checked.problems} == {"teacher-differs"}


@pytest.mark.parametrize("derived", [False, True])
def test_thinning_keeps_the_colours(stores, tmp_path, derived):
    wanted = Subset(crops=2, derived_boxes=derived)
    small = thin(stores[1], open_location(tmp_path / "small"), wanted)
    assert not verify.verify(small, full=True)
    part = small.rounds()[0]
    kept = rounds.crops_of(small, part, 0).jitter_NM4
    assert np.array_equal(
        kept, rounds.crops_of(stores[1], stores[1].rounds()[0], 0).jitter_NM4[:, :2]
    )


def test_a_store_grows_with_its_own_jitter_only(stores, tmp_path, folder, teacher):
    shutil.copytree(stores[1].url, tmp_path / "store")
    with pytest.raises(StoreMismatchError, match=r"crop\.jitter"):
        make_store(
            tmp_path / "store", folder, [teacher], form="full", crops=6, crop=CropDistribution()
        )
    make_store(tmp_path / "store", folder, [teacher], form="full", crops=6)  # takes the store's
    store = open_store(tmp_path / "store")
    run = prepare_run(
        tmp_path / "run", folder, store, train_settings(target="full", epochs=6, batch_size=12)
    )
    expected = crops.sample_jitter(
        JITTER, seed=0, image_id_N=crops.image_ids(list(store.images.keys)), crops_M=np.arange(6)
    )
    for batch in run.feed.stream():
        assert np.array_equal(
            batch.values["jitter"], expected[batch.values["row"], batch.values["crop"]]
        )


def test_a_replacement_brings_its_own_colours(stores, tmp_path, folder):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    store = stores[1]
    run = prepare_run(tmp_path / "run", data, store, train_settings(target="full", epochs=2))
    os.remove(images.path_of(data / "train", store.images.keys[7]))
    values = arrays_of(store)["rounds/0/crops/jitter"]
    for batch in run.feed.stream():
        assert 7 not in batch.values["row"].tolist()
        assert np.array_equal(
            batch.values["jitter"], values[batch.values["row"], batch.values["crop"]]
        )


def test_fresh_crops_are_jittered_without_a_store(tmp_path, folder):
    settings = train_settings(target="ground-truth", epochs=2, crop=CropDistribution(jitter=JITTER))
    run = prepare_run(tmp_path / "run", folder, None, settings)
    ids = crops.image_ids(list(run.feed.data.keys))
    drawn = crops.sample_jitter(JITTER, seed=0, image_id_N=ids, crops_M=np.arange(2))
    for batch in run.feed.stream():
        assert np.array_equal(
            batch.values["jitter"], drawn[batch.values["row"], batch.values["crop"]]
        )
    plain = prepare_run(tmp_path / "plain", folder, None, train_settings(target="ground-truth"))
    assert "jitter" not in next(plain.feed.stream()).values
