"""fit-basis: sums over a stream of crops against all features held at once."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import click.testing
import numpy as np
import pytest
import torch
from conftest import CLASSES, load_teacher
from PIL import Image
from pipeline import CPU, arrays_of, make_store

from fkdpipe.cli import cli
from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import (
    FkdpipeError,
    ImagesError,
    ModelError,
    StoreMismatchError,
    UsageError,
)
from fkdpipe.labelgen import check, fit_basis
from fkdpipe.labelgen.fit_basis import FitSettings
from fkdpipe.labelgen.generate import Resources
from fkdpipe.networks import feature_layers, features
from fkdpipe.networks.feature_layers import Needs
from fkdpipe.pixels import crops, images, replay
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.pixels.replay import Request, View, normalise
from fkdpipe.storage import features as codes

LAW = CropDistribution(scale=(0.3, 1.0))
ALL = FitSettings(teacher="test", fraction=1.0, crops=3, crop=LAW, seed=5, batch_size=16)


@pytest.fixture(scope="module")
def network(checkpoint):
    return load_teacher(checkpoint, needs=Needs(pre=True, penultimate=True))


def fit(data, teacher, settings=ALL, rank=Rank()):
    sample = fit_basis.from_folder(data, settings)
    resources = Resources(device=CPU, batch=settings.batch_size, threads=2, rank=rank)
    return fit_basis.fit(sample, teacher, settings, resources)


@pytest.fixture(scope="module")
def fitted(folder, network):
    return fit(folder, network)


def features_of(folder, teacher, settings) -> np.ndarray:
    """The slow twin: every crop replayed alone, all features in memory."""
    scanned = images.scan(folder)
    drawn = crops.sample(
        settings.crop, seed=settings.seed, image_id_N=crops.image_ids(scanned.keys),
        size_N2=scanned.size_N2, crops_M=np.arange(settings.crops),
    )  # fmt: skip
    p = teacher.preprocessing
    vectors = []
    with replay.open_replay("cpu", [View(p.size, p.interpolation)]) as replayer:
        for row, key in enumerate(scanned.keys):
            (pixels,) = replayer.run([
                Request([images.path_of(scanned.root, key)], scanned.size_N2[[row]],
                        drawn.box_NM4[[row]], drawn.flip_NM[[row]])
            ])  # fmt: skip
            vectors.append(teacher.outputs(normalise(pixels.views[0], p.mean, p.std)).pre)
    return torch.cat(vectors).double().numpy()


def test_the_streamed_basis_is_the_svd_of_all_features(folder, network, fitted):
    x = features_of(folder, network, ALL)
    basis = fitted.basis
    assert basis.count == len(x) == 51 * 3
    assert np.allclose(basis.mean_D, x.mean(0), atol=1e-5)
    assert np.allclose(basis.channel_std_D, x.std(axis=0, ddof=1), rtol=1e-4, atol=1e-6)
    _, singular, right_KD = np.linalg.svd(x - x.mean(0), full_matrices=False)
    assert np.allclose(basis.std_K, singular / np.sqrt(len(x) - 1), rtol=1e-4, atol=1e-5)
    cosine = np.abs((basis.components_DK[:, :8] * right_KD[:8].T).sum(0))
    assert np.allclose(cosine, 1, atol=1e-5)


def test_shares_of_two_processes_add_up(folder, network, fitted, monkeypatch):
    """Without a process group: each process's sums are caught and added here."""
    caught = []
    monkeypatch.setattr(
        fit_basis, "_add_up", lambda sums, failed, rank: caught.append(sums) or failed
    )
    for index in range(2):
        fit(folder, network, rank=Rank(index, 2))
    first, second = caught
    first.add(torch.empty(0, len(fitted.basis.mean_D)))
    total = features.fit(
        int(first.count + second.count),
        (first.sum_D + second.sum_D).numpy(),
        (first.product_DD + second.product_DD).numpy(),
        {},
    )
    assert total.count == fitted.basis.count
    assert np.allclose(total.mean_D, fitted.basis.mean_D, rtol=1e-12, atol=1e-12)
    assert np.allclose(total.std_K, fitted.basis.std_K, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_two_processes_give_the_basis_of_one(tmp_path, folder, checkpoint, fitted):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable, "-m", "fkdpipe", "fit-basis", str(folder), str(tmp_path / "basis"),
        "--teacher", f"test_resnet={checkpoint}", "--fraction", "1", "--crops", "3",
        "--seed", "5", "--set", "batch_size=16", "--set", "crop.scale=[0.3,1.0]",
        "--set", "threads=1", "--device", "cpu", "--json",
    ]  # fmt: skip
    started = [
        subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"RANK": str(index), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert json.loads(said[0][0])["vectors"] == fitted.basis.count
    assert said[1][0] == ""  # the first process alone speaks and writes
    made = features.load_basis(tmp_path / "basis")
    assert np.allclose(made.mean_D, fitted.basis.mean_D, rtol=1e-5, atol=1e-5)
    assert np.allclose(made.std_K, fitted.basis.std_K, rtol=1e-4, atol=1e-5)
    leading = np.abs((made.components_DK[:, :8] * fitted.basis.components_DK[:, :8]).sum(0))
    assert np.allclose(leading, 1, atol=1e-5)


def test_a_store_of_the_same_distribution_and_seed_gives_the_very_same_basis(
    tmp_path, folder, network, fitted
):
    store = make_store(
        tmp_path / "store", folder, [network], form="none", features=("pre",), crop=LAW, seed=5
    )
    sample = fit_basis.from_store(store, folder, ALL)
    resources = Resources(device=CPU, batch=16, threads=2)
    again = fit_basis.fit(sample, network, ALL, resources)
    assert again.basis.digest == fitted.basis.digest
    with pytest.raises(FkdpipeError, match="has 4 crops per image, not the requested 9"):
        fit_basis.from_store(store, folder, FitSettings(teacher="t", crops=9))


def test_generation_stores_the_leading_components_of_the_same_crops(
    tmp_path, folder, network, fitted
):
    """Fitted before there was a store; raw vectors may stand beside the components."""
    features.save_basis(tmp_path / "basis", fitted.basis)
    store = make_store(
        tmp_path / "store", folder, [network], form="none", features=("pre:6", "post"),
        basis=tmp_path / "basis", crop=LAW, seed=5, crops=3,
    )  # fmt: skip
    values = arrays_of(store)
    kept = values["rounds/0/features/t/pre/value"].astype(np.float64).reshape(-1, 6)
    assert np.allclose(kept.mean(0), 0, atol=1e-2 * kept.std())  # of the fitted crops themselves
    assert np.allclose(kept.std(axis=0, ddof=1), fitted.basis.std_K[:6], rtol=1e-2)
    part = store.part("rounds/0/features/t/pre")
    assert part.settings.basis == fitted.basis.digest
    width = len(fitted.basis.mean_D)
    assert values["rounds/0/features/t/post/value"].shape[-1] == width
    assert codes.error_bound("float16") < 1e-3
    again = functools.partial(check.teacher, store, part, folder, [network], device=CPU, sample=9)
    assert not again(basis=fitted.basis).problems
    other = dataclasses.replace(fitted.basis, mean_D=fitted.basis.mean_D + 1)
    for given, words in ((other, "is not the one that"), (None, "Name its file")):
        with pytest.raises(StoreMismatchError, match=words):
            again(basis=given)


def test_a_share_takes_so_many_of_every_class_and_depends_on_the_seed(folder, scanned):
    def classes(fraction, seed):
        settings = FitSettings(teacher="t", fraction=fraction, seed=seed)
        sample = fit_basis.from_folder(folder, settings)
        return sorted(sample.keys), [key.split("/")[0] for key in sample.keys]

    keys, names = classes(0.25, 0)
    assert {name: names.count(name) for name in CLASSES} == {
        "ash": 2, "beech": 2, "cedar": 5, "date palm": 2, "élm": 2,
    }  # fmt: skip
    assert set(keys) < set(classes(0.5, 0)[0]) < set(scanned.keys)
    assert keys != classes(0.25, 1)[0]


def test_a_flat_folder_and_broken_images_will_do(tmp_path, network, cut):
    for k in range(12):
        cut(k, 50, 60).save(tmp_path / f"{k}.jpg")
    whole = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "0.jpg").write_bytes(whole[: len(whole) // 2])  # a good header
    made = fit(tmp_path, network)
    assert made.images == 11
    assert made.basis.count == 33
    assert list(made.failed) == ["0.jpg"]
    for k in range(7):
        (tmp_path / f"{k}.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImagesError, match=r"7 of 12 images cannot be used"):
        fit(tmp_path, network)


def test_another_teacher_or_preprocessing_is_refused(network, fitted):
    facts = network.facts()
    fitted.basis.check_teacher(facts)
    with pytest.raises(ModelError, match="with different weights"):
        fitted.basis.check_teacher(facts | {"weights": "0" * 64})
    with pytest.raises(ModelError, match="with different size, mean"):
        fitted.basis.check_teacher(facts | {"size": [64, 64], "mean": [0.0, 0.0, 0.0]})


@pytest.mark.parametrize("fraction", [0, 1.01, -0.5, float("nan"), "10%"])
def test_a_fraction_that_is_no_share_is_refused(fraction):
    with pytest.raises(UsageError, match="number above 0 and at most 1; found"):
        FitSettings(teacher="t", fraction=fraction)


def test_too_many_components_are_found_before_the_work(folder, network, monkeypatch):
    width = feature_layers.width(network.module.network)
    seen = []

    def of_rank_five(*arguments):
        directions = torch.randn(5, width)
        for _ in range(1000):
            seen.append(16)
            yield torch.randn(16, 5) @ directions

    monkeypatch.setattr(fit_basis, "_vectors", of_rank_five)
    sample = fit_basis.from_folder(folder, ALL)
    resources = Resources(device=CPU, batch=16)
    with pytest.raises(UsageError, match=f"features of width {width}; use"):
        fit_basis.fit(sample, network, ALL, resources, components=width + 1)
    few = fit_basis.from_folder(folder, replace(ALL, fraction=0.1, crops=1))
    count = few.crops.flip_NM.size
    assert count <= width
    with pytest.raises(UsageError, match=f"{count} components need more than {count} crops"):
        fit_basis.fit(few, network, ALL, resources, components=count)
    assert not seen
    with pytest.raises(UsageError, match=r"span 5 dimensions.* method.alignment=variance"):
        fit_basis.fit(sample, network, ALL, resources, components=20)
    assert sum(seen) == 48  # of 16,000: the first batches with twice as many vectors
    seen.clear()
    assert fit_basis.fit(sample, network, ALL, resources, components=5).basis.rank == 5
    assert len(seen) == 1000


def test_a_rank_that_is_found_late_ends_in_a_basis_and_a_line(
    tmp_path, folder, checkpoint, monkeypatch
):
    """Fewer vectors than the probe needs: the work is kept, and the statistics are of the rank."""

    def of_rank_five(sample, teacher, *arguments):
        yield torch.randn(30, 5) @ torch.randn(5, feature_layers.width(teacher.module.network))

    monkeypatch.setattr(fit_basis, "_vectors", of_rank_five)
    words = [
        "fit-basis", str(folder), str(tmp_path / "basis"), "--fraction", "1", "--device", "cpu",
        "--teacher", f"test_resnet={checkpoint}", "--components", "20", "--json",
    ]  # fmt: skip
    outcome = click.testing.CliRunner().invoke(cli, words)
    assert outcome.exit_code == 0, outcome.output
    assert "The features span 5 of the 20 components asked for." in outcome.stderr
    assert json.loads(outcome.stdout)["components"] == 5
    assert features.load_basis(tmp_path / "basis").rank == 5


def test_the_command_tells_the_std_ratios_and_draws_them(tmp_path, folder, checkpoint):
    words = [
        "fit-basis", str(folder), str(tmp_path / "basis"), "--fraction", "1", "--crops", "2",
        "--teacher", f"test_resnet={checkpoint}", "--components", "8", "--device", "cpu",
    ]  # fmt: skip
    runner = click.testing.CliRunner()
    told = runner.invoke(cli, [*words, "--json", "--plot", str(tmp_path / "plot.png")])
    assert told.exit_code == 0, told.output
    answer = json.loads(told.stdout)
    assert (answer["images"], answer["vectors"], answer["components"]) == (51, 102, 8)
    basis = features.load_basis(tmp_path / "basis")
    assert answer["std_ratio"] == features.std_ratios(basis, 8)
    with Image.open(tmp_path / "plot.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    before = (tmp_path / "basis").read_bytes()
    refused = runner.invoke(cli, words)  # a store may need it
    assert refused.exit_code == 2
    assert "Choose another name, or delete the file" in refused.stderr
    assert (tmp_path / "basis").read_bytes() == before
    text = runner.invoke(cli, [*words[:2], str(tmp_path / "again"), *words[3:]]).stdout
    assert "after PTS" in text
    assert f"{answer['std_ratio']['svd']:,.2f}" in text
