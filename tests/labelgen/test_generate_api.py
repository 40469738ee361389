"""`generate` from Python: the labels of any module, and the same store as the command makes."""

from __future__ import annotations

import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import CLASSES
from foreign_networks import STATISTICS, small_cnn, write_functions
from PIL import Image
from pipeline import arrays_of

from fkdpipe.cli import cli
from fkdpipe.common.errors import ModelError, StoreMismatchError, UsageError
from fkdpipe.labelgen.api import generate
from fkdpipe.networks import weight_files
from fkdpipe.networks.teachers import load_teacher
from fkdpipe.pixels import images, replay
from fkdpipe.pixels.replay import Request, View
from fkdpipe.storage.store import open_store


def invoke(*words) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


def pixels_of(store, folder, crop: int, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (N, 3, *size): one recorded crop of every image."""
    arrays, root = arrays_of(store), images.split_root(folder, "train")
    request = Request(
        paths=[images.path_of(root, key) for key in store.images.keys],
        size_I2=store.images.size_N2,
        box_Im4=arrays["rounds/0/crops/box"][:, [crop]],
        flip_Im=arrays["rounds/0/crops/flip"][:, [crop]],
    )
    with replay.open_replay("cpu", [View(size)]) as replayer:
        (pixels,) = replayer.run([request])
        return pixels.views[0].clone()


def softmax_by_hand(network, pixels) -> np.ndarray:
    """What the user's own module says of normalised pixels."""
    mean, std = (torch.tensor(STATISTICS[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        return network.eval()((pixels / 255 - mean) / std).softmax(1).numpy()


@pytest.fixture
def functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return write_functions(tmp_path)


def test_the_labels_of_a_module_are_its_own_softmax_on_the_recorded_crops(tmp_path, folder):
    network = small_cnn()
    teacher = load_teacher(network, size=(40, 32), name="ours", **STATISTICS)
    result = generate(folder, tmp_path / "s", teacher=teacher, form="full", crops=2, batch_size=7)
    assert (result.images, result.crops_per_image, result.complete) == (51, 2, True)
    assert (result.new_units, result.kept_units, result.failed) == (1, 0, {})
    store = open_store(result.url)
    stored = np.exp(arrays_of(store)["rounds/0/labels/ours/log_prob"].astype(np.float32))
    for crop in range(2):
        own = softmax_by_hand(network, pixels_of(store, folder, crop, (40, 32)))
        np.testing.assert_allclose(stored[:, crop], own, atol=2e-3)
        assert np.abs(stored[:, 1 - crop] - own).max() > 2e-2  # the other crop has other labels


@pytest.mark.parametrize("form", ["full", "logits", "topk:2", "topk:2:compact", "hard"])
def test_the_first_choices_are_compared_with_the_folders_classes(tmp_path, folder, form):
    how = {"form": form, "crops": 2, "batch_size": 7}
    teacher = load_teacher(small_cnn(), size=32, name="ours", **STATISTICS)
    result = generate(folder, tmp_path / "s", teacher=teacher, **how)
    store = open_store(tmp_path / "s")
    own = [softmax_by_hand(small_cnn(), pixels_of(store, folder, m, (32, 32))) for m in range(2)]
    chosen_NM = np.stack(own, 1).argmax(2)
    right = (chosen_NM == store.images.class_N[:, None]).mean()
    assert result.agreement.crops == chosen_NM.size
    assert result.agreement.top1 == pytest.approx(100 * right)
    shares = [
        np.bincount(v.ravel(), minlength=5) / v.size for v in (chosen_NM, store.images.class_N)
    ]
    assert result.agreement.chance == pytest.approx(100 * shares[0] @ shares[1])
    assert generate(folder, tmp_path / "s", teacher=teacher, **how).agreement is None


class _Knows(torch.nn.Module):
    """Names the class that the picture's grey value says, at the output `order` gives it."""

    def __init__(self, order):
        super().__init__()
        self.order = torch.nn.Parameter(torch.tensor(order, dtype=torch.float32))

    def forward(self, x):
        shade_B = (x.mean((1, 2, 3)) * 12 - 0.5).round().clamp(0, 11).long()
        return torch.nn.functional.one_hot(self.order.long()[shade_B], 12).float() * 9


def test_a_wrong_order_of_the_classes_shows(tmp_path, caplog):
    names = sorted(map(str, range(12)))
    for name in names:
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(2):
            shade = round((int(name) + 0.5) / 12 * 255)
            Image.new("RGB", (40, 40), (shade,) * 3).save(tmp_path / "images" / name / f"{k}.png")
    statistics = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    teacher = load_teacher(_Knows(range(12)), size=32, name="natural", **statistics)
    how = {"crops": 2, "form": "topk:3"}
    with pytest.raises(ModelError, match="--numbered"):
        generate(tmp_path / "images", tmp_path / "none", teacher=teacher, **how)
    result = generate(tmp_path / "images", tmp_path / "s", teacher=teacher, numbered=True, **how)
    assert (result.agreement.top1, result.agreement.crops) == (100.0, 48)
    assert not caplog.records
    told = load_teacher(teacher.module.network, size=32, class_map=tuple(names), **statistics)
    wrong = generate(tmp_path / "images", tmp_path / "wrong", teacher=told, **how)
    assert wrong.agreement.top1 == pytest.approx(100 * 2 / 12)  # "0" and "1" stay in place
    assert wrong.agreement.chance == pytest.approx(100 / 12)
    assert "only 16.7 % of the crops; chance is 8.3 %" in caplog.text


def test_what_made_them_is_recorded(tmp_path, folder):
    teacher = load_teacher(small_cnn(), size=32, name="ours", **STATISTICS)
    generate(folder, tmp_path / "s", teacher=teacher, form="hard", crops=1)
    (facts,) = open_store(tmp_path / "s").part("rounds/0/labels/ours").settings.teachers
    assert facts == {
        "name": "ours", "library": "python", "share": 1.0, "classes": 5, "columns": None,
        "weights": weight_files.state_digest(small_cnn()), "size": [32, 32],
        "interpolation": "bilinear", "mean": [0.45, 0.5, 0.55], "std": [0.2, 0.25, 0.3],
    }  # fmt: skip


def test_a_module_and_a_named_network_are_averaged(tmp_path, folder, checkpoint, teacher):
    network = small_cnn()
    network.pretrained_cfg = {"input_size": (3, 32, 32), **STATISTICS}
    pair = [network, f"test_resnet={checkpoint}"]
    shares = {"teacher_weight": [3, 1]}
    generate(folder, tmp_path / "s", teacher=pair, form="full", crops=1, **shares)
    store = open_store(tmp_path / "s")
    path = "rounds/0/labels/Sequential+test_resnet"
    assert [t["name"] for t in store.part(path).settings.teachers] == [
        "Sequential",
        "test_resnet",
    ]
    pixels = pixels_of(store, folder, 0, (32, 32))
    p = teacher.preprocessing
    other = teacher.logits(replay.normalise(pixels, p.mean, p.std)).softmax(1).numpy()
    expected = 0.75 * softmax_by_hand(network, pixels) + 0.25 * other
    stored = np.exp(arrays_of(store)[f"{path}/log_prob"][:, 0].astype(np.float32))
    np.testing.assert_allclose(stored, expected, atol=2e-3)


def test_called_again_it_keeps_what_is_there_and_changed_weights_are_refused(tmp_path, folder):
    network, how = small_cnn(), {"size": 32, "name": "ours", **STATISTICS}
    generate(folder, tmp_path / "s", teacher=load_teacher(network, **how), crops=1)
    again = generate(folder, tmp_path / "s", teacher=load_teacher(network, **how))
    assert (again.new_units, again.kept_units, again.complete) == (0, 1, True)
    with torch.no_grad():
        network[-1].bias[0] += 1
    with pytest.raises(StoreMismatchError, match=r"labels/ours .*teachers.0.weights: \w+.*, now "):
        generate(folder, tmp_path / "s", teacher=load_teacher(network, **how))


def test_two_processes_share_the_work_under_torchrun_and_by_part(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 16)
    teacher = load_teacher(small_cnn(), size=32, **STATISTICS)
    how = {"teacher": teacher, "form": "full", "crops": 2, "batch_size": 8, "threads": 1}
    generate(folder, tmp_path / "alone", **how)
    first = generate(folder, tmp_path / "parts", part="1/2", **how)
    assert (first.new_units, first.complete) == (2, False)
    assert generate(folder, tmp_path / "parts", part="2/2", **how).complete
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        last = generate(folder, tmp_path / "ranks", **how)
    assert last.complete
    alone = arrays_of(open_store(tmp_path / "alone"))
    for name in ("parts", "ranks"):
        other = arrays_of(open_store(tmp_path / name))
        assert all(np.array_equal(values, other[path]) for path, values in alone.items())


def test_the_command_makes_the_same_store(tmp_path, folder, checkpoint):
    named = f"test_resnet={checkpoint}"
    how = {"form": "topk:3", "features": ["post"], "crops": 2, "seed": 3, "source": "t"}
    generate(folder, tmp_path / "a", teacher=named, temperature=2.0, batch_size=16, **how)
    code, output = invoke(
        "generate", folder, tmp_path / "b", "--teacher", named, "--form", "topk:3",
        "--features", "post", "--crops", 2, "--seed", 3, "--source", "t", "--temperature", 2,
        "--set", "batch_size=16",
    )  # fmt: skip
    assert code == 0, output
    assert re.search(r"first choice is the folder's class for [\d.]+ % of 102 crops", output)
    a, b = (open_store(tmp_path / name) for name in "ab")
    assert {p: a.part(p).settings for p in a.parts} == {p: b.part(p).settings for p in b.parts}
    other = arrays_of(b)
    assert all(np.array_equal(values, other[path]) for path, values in arrays_of(a).items())


def test_arguments_that_cannot_be_right(tmp_path, folder, checkpoint):
    with pytest.raises(UsageError, match="teacher: name at least one"):
        generate(folder, tmp_path / "s", teacher=[], crops=1)
    with pytest.raises(UsageError, match="crops"):
        generate(folder, tmp_path / "s", teacher=f"test_resnet={checkpoint}", crops=0)
    with pytest.raises(UsageError, match="names code to run"):
        generate(folder, tmp_path / "s", teacher="python:os:getcwd", crops=1)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("named", [True, False])
def test_verify_runs_a_python_teacher_again(tmp_path, folder, functions, named):
    text = f"python:{functions}:teacher"
    if named:
        code, output = invoke("generate", folder, "s", "--teacher", text, "--crops", 2)
        assert code == 0, output
    else:
        name = text.removeprefix("python:")
        teacher = load_teacher(small_cnn(), size=32, name=name, **STATISTICS)
        generate(folder, "s", teacher=teacher, crops=2)
    code, output = invoke("verify", "s", "--data", folder, "--teacher", text)
    assert code == 0, output
    assert "the teacher agrees on 64 crops" in output
    torch.save(small_cnn(seed=9).state_dict(), tmp_path / "other.pth")
    code, output = invoke("verify", "s", "--data", folder, "--teacher", f"{text}=other.pth")
    assert code == 1
    assert "made by other teachers: teachers.0.weights" in output


# -- towers: features and no classes


@pytest.fixture
def tower(tmp_path):
    torch.manual_seed(0)
    module = timm.create_model("test_vit", num_classes=0)
    torch.save(module.state_dict(), tmp_path / "tower.pth")
    return f"test_vit={tmp_path / 'tower.pth'}"


@pytest.fixture
def flat(tmp_path, folder):
    """Images without classes."""
    (tmp_path / "flat").mkdir()
    for k, file in enumerate(sorted(folder.glob("train/*/?.jpg"))[:6]):
        shutil.copy(file, tmp_path / "flat" / f"{k}.jpg")
    return tmp_path / "flat"


def test_a_tower_gives_features_with_and_without_class_folders(tmp_path, folder, flat, tower):
    for data, store in ((folder, tmp_path / "classes"), (flat, tmp_path / "none")):
        code, output = invoke(
            "generate", data, store, "--teacher", tower, "--form", "none", "--features", "post",
            "--crops", 1,
        )  # fmt: skip
        assert code == 0, output
        part = open_store(store).part("rounds/0/features/test_vit/post")
        assert part.settings.teachers[0]["classes"] == 0
        code, output = invoke("verify", store, "--data", data, "--teacher", tower)
        assert code == 0, output


@pytest.mark.parametrize("form", [None, "topk:3", "logits", "hard"])
def test_only_who_asks_a_tower_for_labels_is_refused(tmp_path, folder, flat, tower, form):
    for data in (folder, flat):
        with pytest.raises(
            ModelError, match=r"has no classifier, so it cannot label images"
        ) as raised:
            generate(data, tmp_path / "s", teacher=tower, form=form, features=["post"], crops=1)
        assert raised.value.code == "no-classifier"
    assert not (tmp_path / "s").exists()


def test_a_plain_module_has_no_features_and_says_why(tmp_path, folder):
    teacher = load_teacher(small_cnn(), size=32, **STATISTICS)
    with pytest.raises(ModelError, match="Sequential has no forward_features"):
        generate(folder, tmp_path / "s", teacher=teacher, features=["post"], crops=1)
    assert len(CLASSES) == teacher.classes
