"""KDEP: its targets against the formulas, from stores and from a live teacher, and its training."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import oracles
import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import CLASSES, load_teacher
from pipeline import CPU, make_store, prepare_run, train_settings
from safetensors.torch import load_file

from fkdpipe.cli import cli
from fkdpipe.common.errors import ModelError, StoreMismatchError, TrainingError, UsageError
from fkdpipe.labelgen import fit_basis
from fkdpipe.labelgen.fit_basis import FitSettings
from fkdpipe.labelgen.generate import Resources
from fkdpipe.networks import features, models, teachers, weight_files
from fkdpipe.networks.feature_layers import Needs, Outputs
from fkdpipe.storage.settings import FeatureSettings
from fkdpipe.storage.store import open_store
from fkdpipe.train import loop, metrics
from fkdpipe.train import step as stepping
from fkdpipe.train.methods import kdep
from fkdpipe.train.methods.interface import Context, Targets

WIDTH = 24  # of the student
NARROW = {"channels": [16, 16, 16, WIDTH]}
RAW, COMPONENTS, LIVE = "pre", "pre:40", "live"


@pytest.fixture(scope="module")
def network(checkpoint):
    return load_teacher(checkpoint, needs=Needs(pre=True, penultimate=True))


@pytest.fixture(scope="module")
def basis_file(tmp_path_factory, folder, network):
    settings = FitSettings(teacher="t", fraction=1.0, crops=4)
    sample = fit_basis.from_folder(folder, settings)
    fitted = fit_basis.fit(sample, network, settings, Resources(device=CPU, threads=2))
    file = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    features.save_basis(file, fitted.basis)
    return file


@pytest.fixture(scope="module")
def stores(tmp_path_factory, folder, network, basis_file):
    """By (features, code): raw vectors, and leading components; no labels."""
    place = tmp_path_factory.mktemp("stores")

    def make(text, code):
        return make_store(
            place / f"{text.replace(':', '')}-{code}", folder, [network], form="none",
            features=(text, "post") if text == RAW else (text,), features_code=code,
            basis=basis_file,
        )  # fmt: skip

    wanted = [(RAW, "float16"), (COMPONENTS, "float16"), (COMPONENTS, "int8")]
    return {key: make(*key) for key in wanted}


def settings_of(checkpoint, kind, *, method=None, **changes):
    live = {"teacher": f"test_resnet={checkpoint}"} if kind == LIVE else {}
    return train_settings(
        target="ground-truth", student_options=NARROW, method={"name": "kdep", **(method or {})},
        **{"precision": "float32", **live, **changes},
    )  # fmt: skip


def run_of(place, folder, stores, checkpoint, kind, code="float16", **options):
    """A run from stored features, or on the same crops with the teacher live."""
    store = stores[(RAW, "float16") if kind == LIVE else (kind, code)]
    return prepare_run(place, folder, store, settings_of(checkpoint, kind, **options))


def test_loss_is_the_weight_where_every_feature_is_off_by_one():
    method = kdep.Kdep(
        kdep.Settings(feature_weight=3.0),
        torch.nn.Identity(),
        torch.nn.Identity(),
        torch.nn.Identity(),
    )
    teacher = Outputs(torch.zeros(4, 0), pre=torch.randn(4, 7))
    student = Outputs(torch.zeros(4, 5), pre=teacher.pre + 1)
    empty = torch.zeros(4, 0)
    terms = method.loss(student, Targets(empty, empty, teacher))
    assert torch.allclose(terms["kdep"], torch.full((4,), 3.0))


@pytest.mark.parametrize(
    ("kind", "code", "worst_loss"),
    [(RAW, "float16", 2e-3), (COMPONENTS, "float16", 5e-5), (COMPONENTS, "int8", 3e-3)],
)
def test_a_student_of_stored_features_learns_what_one_with_the_teacher_online_does(
    tmp_path, folder, stores, checkpoint, basis_file, kind, code, worst_loss
):
    """Batch by batch: the same pixels, targets within the storage precision, so the same losses.

    Both students begin each step with the same weights, since training multiplies last bits.
    `worst_loss` bounds the relative difference of the losses.
    """
    given = {"basis": str(basis_file), "feature_weight": 1.0}
    runs = [
        run_of(tmp_path / "live", folder, stores, checkpoint, LIVE, method=given),
        run_of(tmp_path / "stored", folder, stores, checkpoint, kind, code, method=given),
    ]
    assert runs[0].teacher is not None
    assert runs[1].teacher is None
    losses = []
    for batches in zip(*(run.crops.stream() for run in runs), strict=True):
        assert torch.equal(batches[0].pixels, batches[1].pixels)
        sides = [stepping.prepare(r, b)[1].teacher for r, b in zip(runs, batches, strict=True)]
        exact, kept = (r.method.target(side) for r, side in zip(runs, sides, strict=True))
        assert not torch.equal(exact, kept)
        check_precision(exact, kept, sides[1].pre, kind, code)
        runs[1].learner.load_state_dict(runs[0].learner.state_dict())
        losses.append([float(stepping.step(r, b)[0]) for r, b in zip(runs, batches, strict=True)])
        for run in runs:
            run.step += 1
    told = np.array(losses)
    assert np.abs(told[:, 0] / told[:, 1] - 1).max() < worst_loss
    assert np.abs(told[0, 0] - told[-1, 0]) > 0.01  # the students did move


def check_precision(exact, kept, stored, kind, code) -> None:
    """float16 rounds vectors by 2^-11. One byte holds the cube root of a component with a step of
    (largest)^(1/3) / 127, which is just what PTS makes of it: it is off by half a step."""
    if code == "int8":
        largest = stored.abs().amax(dim=1, keepdim=True)
        difference, allowed = exact - kept, features.pts(largest) * 0.5 / 127
    else:
        difference = oracles.pts_inverse(exact) - oracles.pts_inverse(kept)
        allowed = 2**-11 * (
            oracles.pts_inverse(exact).abs() if kind != RAW else stored.norm(dim=1)[:, None]
        )
    assert (difference.abs() <= 1.01 * allowed + 1e-4).all()


def test_the_target_is_pts_of_the_leading_components(
    tmp_path, folder, stores, checkpoint, network, basis_file
):
    basis = features.load_basis(basis_file)
    run = run_of(
        tmp_path / "run", folder, stores, checkpoint, LIVE, method={"basis": str(basis_file)}
    )
    for batch in run.crops.stream():
        x = network.outputs(batch.teacher_pixels).pre.double().numpy()
        f = (x - basis.mean_D) @ basis.components_DK[:, :WIDTH]
        expected = np.sign(f) * np.abs(f / 0.1) ** (1 / 3)
        made = run.method.target(stepping.prepare(run, batch)[1].teacher).numpy()
        assert np.abs(made - expected).max() < 2e-2
        assert np.median(np.abs(made - expected)) < 1e-4
        break


def context_of(basis_file, student=WIDTH, stored=None) -> Context:
    basis = features.load_basis(basis_file)
    network = timm.create_model("test_resnet")
    width = stored["dims"] if stored else 96
    kept = stored and FeatureSettings("pre", width, 96, "float16", 1, basis=stored["basis"])
    return Context(
        classes=0, scores=0, epochs=1, features=kept,
        student_network=network, teacher_network=network,
        student=Outputs(torch.zeros(1, 0), pre=torch.zeros(1, student)),
        teacher=Outputs(torch.zeros(1, 0), pre=torch.zeros(1, width)),
        teacher_facts=basis.facts["teacher"],
    )  # fmt: skip


def built(settings, context):
    return kdep.build(kdep.Settings(**{"feature_weight": 1.0, **settings}), context)


def test_other_alignments_and_transformations_are_their_formulas(basis_file):
    basis = features.load_basis(basis_file)
    x = torch.randn(5, 96) + 2
    context = context_of(basis_file)
    raw = Outputs(torch.zeros(5, 0), pre=x)
    f = basis.project(x, WIDTH)
    std = torch.from_numpy(basis.std_K[:WIDTH]).float()
    by_std = np.argsort(-basis.channel_std_D, kind="stable")[:WIDTH]
    picked = features.random_channels(96, WIDTH, 4)
    expected = {
        ("svd", "none"): f,
        ("svd", "sn"): f / std,
        ("svd", "sm"): f / std * torch.from_numpy(basis.channel_std_D[by_std]).float(),
        ("svd", "auto"): features.pts(f),
        ("variance", "auto"): x[:, by_std],
        ("random", "auto"): x[:, picked],
        ("interpolation", "none"): x[:, ::4],
    }
    for (alignment, transformation), wanted in expected.items():
        settings = {"alignment": alignment, "transformation": transformation, "seed": 4}
        method = built({**settings, "basis": basis_file}, context)
        assert torch.allclose(method.target(raw), wanted, rtol=1e-4, atol=1e-4), alignment
        assert not list(method.parameters())


@pytest.mark.parametrize("kind", ["conv-post", "conv-pre"])
def test_the_parametric_alignments_train_their_projection(
    tmp_path, folder, stores, checkpoint, kind
):
    settings = settings_of(checkpoint, RAW, method={"alignment": kind}, epochs=2)
    run = prepare_run(tmp_path / "run", folder, stores[RAW, "float16"], settings)
    before = copy.deepcopy(run.method.state_dict())
    loop.train(run)
    after = run.method.state_dict()
    assert after["project.0.weight"].shape == (96, WIDTH)
    assert not torch.equal(before["project.0.weight"], after["project.0.weight"])
    assert set(load_file(tmp_path / "run" / "student.safetensors")) == set(
        timm.create_model("test_resnet", num_classes=5, **NARROW).state_dict()
    )


def test_the_classifier_rests_and_the_export_is_a_plain_timm_model(
    tmp_path, folder, stores, checkpoint
):
    run = run_of(
        tmp_path / "run", folder, stores, checkpoint, COMPONENTS,
    )  # fmt: skip
    before = copy.deepcopy(run.module.network.state_dict())
    result = loop.train(run)
    after = load_file(result.student)
    assert torch.equal(after["fc.weight"], before["fc.weight"])  # not even weight decay
    assert run.module.network.fc.weight.grad is None
    assert not torch.equal(after["conv1.0.weight"], before["conv1.0.weight"])
    assert result.top1 is None  # an untrained classifier is not evaluated
    as_teacher = [models.parse_spec(str(tmp_path / "run"))]
    with pytest.raises(ModelError, match="its classifier was not trained"):
        teachers.load_teachers(as_teacher, class_names=CLASSES)
    assert teachers.load_teachers(as_teacher, class_names=())  # it can lend features
    plain = timm.create_model(
        "test_resnet", num_classes=5, checkpoint_path=str(result.student), **NARROW
    ).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        vectors = plain.forward_head(plain.forward_features(pixels), pre_logits=True)
        ours = run.module.eval()(pixels)
        assert torch.allclose(plain(pixels), ours.logits, atol=1e-5)
    assert (vectors >= 0).all()  # its last ReLU is back
    assert (ours.pre < 0).any()


def test_a_run_does_not_go_on_with_another_basis_under_the_same_name(
    tmp_path, folder, stores, checkpoint, basis_file
):
    file = tmp_path / "basis.safetensors"
    file.write_bytes(basis_file.read_bytes())
    run_of(tmp_path / "run", folder, stores, checkpoint, RAW, method={"basis": str(file)})
    basis = features.load_basis(file)
    turned = dataclasses.replace(basis, components_DK=-basis.components_DK)
    features.save_basis(file, turned)
    with pytest.raises(TrainingError, match="basis"):
        run_of(tmp_path / "run", folder, stores, checkpoint, RAW, method={"basis": str(file)})


def test_an_automatic_weight_starts_at_6_9_and_survives_a_stop(
    tmp_path, folder, stores, checkpoint, monkeypatch
):
    whole = run_of(tmp_path / "whole", folder, stores, checkpoint, COMPONENTS)
    assert whole.method.weight.isnan()
    first = next(iter(whole.crops.stream()))
    assert float(stepping.step(whole, first)[0]) == pytest.approx(6.9, rel=1e-5)

    straight = run_of(tmp_path / "straight", folder, stores, checkpoint, COMPONENTS)
    expected = load_file(loop.train(straight).student)
    stopped = run_of(tmp_path / "stopped", folder, stores, checkpoint, COMPONENTS)
    plain = loop.step

    def stop(run, batch):
        if run.step == 8:
            loop.save(run)
            raise KeyboardInterrupt
        return plain(run, batch)

    monkeypatch.setattr(loop, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        loop.train(stopped)
    monkeypatch.setattr(loop, "step", plain)
    again = run_of(tmp_path / "stopped", folder, stores, checkpoint, COMPONENTS)
    found = load_file(loop.train(again).student)
    assert again.method.weight == straight.method.weight
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_unlabelled_images_in_a_flat_folder_will_do(tmp_path, checkpoint, basis_file, cut):
    (tmp_path / "flat").mkdir()
    for k in range(20):
        cut(k, 50, 60).save(tmp_path / "flat" / f"{k}.jpg")
    settings = settings_of(checkpoint, LIVE, method={"basis": str(basis_file)}, epochs=2)
    run = prepare_run(tmp_path / "run", tmp_path / "flat", None, settings)
    result = loop.train(run)
    plain = timm.create_model("test_resnet", num_classes=1, **NARROW)
    plain.load_state_dict(load_file(result.student))


def test_the_teachers_classes_need_not_be_the_folders(tmp_path, folder):
    """Nobody asks about them: neither stored features nor a live teacher are matched."""
    file = tmp_path / "other.safetensors"
    other = timm.create_model("test_resnet", num_classes=11)
    weight_files.write_export(file, other, {"student": "test_resnet", "size": [32, 32]})
    store = tmp_path / "store"
    made = ["generate", str(folder), str(store), "--teacher", f"test_resnet={file}", "--form",
            "none", "--features", "pre", "--crops", "4", "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(cli, made)
    assert done.exit_code == 0, done.output
    wanted = {"name": "kdep", "alignment": "interpolation"}
    stored = train_settings(target="ground-truth", student_options=NARROW, method=wanted)
    live = dataclasses.replace(stored, teacher=f"test_resnet={file}")
    losses = []
    for name, settings in (("stored", stored), ("live", live)):
        run = prepare_run(tmp_path / name, folder, open_store(store), settings)
        loop.train(run)
        lines = metrics.read(tmp_path / name / "metrics.jsonl")
        losses.append([x["last_loss"] for x in lines if x["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_what_does_not_go_together_is_refused(basis_file, tmp_path):
    context = context_of(basis_file)
    basis = features.load_basis(basis_file)
    wide = context_of(basis_file, student=120)
    stored = context_of(basis_file, stored={"basis": basis.digest, "dims": 40})
    mistakes = [
        ({}, context, UsageError, "svd of whole vectors needs a basis"),
        ({"alignment": "variance"}, context, UsageError, "variance needs a basis"),
        ({"basis": basis_file}, wide, UsageError, "120 were requested"),
        ({"alignment": "random"}, wide, UsageError, "120 channels cannot be chosen from 96"),
        ({"transformation": "sm"}, stored, UsageError, "transformation sm needs a basis"),
        ({"alignment": "random"}, stored, StoreMismatchError, "holds components of a basis"),
        ({"alignment": "conv-pre"}, stored, StoreMismatchError, "holds components of a basis"),
    ]
    for settings, given, error, message in mistakes:
        with pytest.raises(error, match=message):
            built(settings, given)
    narrow = context_of(basis_file, student=50, stored={"basis": basis.digest, "dims": 40})
    with pytest.raises(StoreMismatchError, match="width is 50, but the store holds 40 components"):
        built({}, narrow)
    other = dataclasses.replace(basis, mean_D=basis.mean_D + 1)
    features.save_basis(tmp_path / "other", other)
    with pytest.raises(StoreMismatchError, match="a different basis"):
        built({"basis": tmp_path / "other"}, stored)
    strange = dataclasses.replace(context, teacher_facts=context.teacher_facts | {"weights": "0"})
    with pytest.raises(ModelError, match="with different weights"):
        built({"basis": basis_file}, strange)
    features.save_basis(
        tmp_path / "post", dataclasses.replace(basis, facts=basis.facts | {"tap": "post"})
    )
    with pytest.raises(ModelError, match="after the last activation"):
        built({"basis": tmp_path / "post"}, context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a number above 0; found 0"),
        ({"feature_weight": -1.0}, "feature_weight must be a number above 0 or auto; found -1"),
        ({"alignment": "random", "transformation": "pts"}, "applies to the components of"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        kdep.Settings(**settings)
