"""Networks of no library: modules handed over, functions named on the command line, towers."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict

import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import CLASSES
from foreign_networks import STATISTICS, small_cnn, write_functions
from safetensors.torch import save_file
from torch import nn

from fkdpipe.cli import cli
from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks import models, teachers, weight_files
from fkdpipe.networks.feature_layers import Needs
from fkdpipe.networks.models import ModelSpec
from fkdpipe.networks.teachers import load_teacher


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module in the current folder, which is importable as by `python -m`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return write_functions(tmp_path)


def invoke(*words) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


def test_a_plain_module_teaches_and_stays_as_it_is():
    network = small_cnn().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    teacher = load_teacher(network, size=(40, 32), name="ours", **STATISTICS)
    assert teacher.classes == len(CLASSES)
    assert teacher.preprocessing.size == (40, 32)
    assert teacher.preprocessing.interpolation == "bilinear"
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not teacher.module.training
    pixels = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(pixels), network.eval()(pixels))
        network[0].weight.add_(1)
    assert teacher.digest == weight_files.state_digest(teacher.module.network)


def test_its_facts_have_the_shape_that_every_teachers_have(teacher):
    facts = load_teacher(small_cnn(), size=32, **STATISTICS).facts()
    assert facts.keys() == teacher.facts().keys()
    assert (facts["name"], facts["library"]) == ("Sequential", "python")
    assert facts["size"] == [32, 32]


def test_the_digest_is_of_the_state_whatever_its_order_and_layout():
    network = small_cnn()
    digest = load_teacher(network, size=32, **STATISTICS).digest
    turned = small_cnn().to(memory_format=torch.channels_last)
    turned.load_state_dict(OrderedDict(reversed(network.state_dict().items())))
    assert load_teacher(turned, size=32, **STATISTICS).digest == digest
    assert load_teacher(network.double().float(), size=32, **STATISTICS).digest == digest
    with torch.no_grad():
        network[-1].bias[0] += 1e-6
    assert load_teacher(network, size=32, **STATISTICS).digest != digest


def test_a_half_precision_module_computes_in_float32():
    teacher = load_teacher(small_cnn().half(), size=32, **STATISTICS)
    assert teacher.logits(torch.randn(1, 3, 32, 32)).dtype == torch.float32


def test_weights_fill_a_module(tmp_path):
    trained = small_cnn(seed=1)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    filled = load_teacher(
        small_cnn(seed=2), weights=tmp_path / "w.safetensors", size=32, **STATISTICS
    )
    assert filled.digest == load_teacher(trained, size=32, **STATISTICS).digest
    with pytest.raises(ModelError, match="does not fit"):
        load_teacher(nn.Linear(2, 2), weights=tmp_path / "w.safetensors", size=32, **STATISTICS)


def test_what_nobody_says_is_asked_for_by_name():
    with pytest.raises(ModelError, match=r"Sequential .*give size, mean, std\. .*load_teacher\("):
        load_teacher(small_cnn())
    with pytest.raises(ModelError, match=r"give mean\."):
        load_teacher(small_cnn(), size=32, std=(1, 1, 1))
    said = small_cnn()
    said.pretrained_cfg = {"input_size": (3, 24, 36), "interpolation": "bicubic", **STATISTICS}
    assert load_teacher(said).preprocessing.size == (24, 36)
    assert load_teacher(said).preprocessing.interpolation == "bicubic"
    assert load_teacher(said, size=48, interpolation="bilinear").preprocessing.size == (48, 48)


def test_a_timm_module_says_itself_what_it_takes():
    module = timm.create_model("test_vit")
    teacher = load_teacher(module)
    named = models.build(ModelSpec("test_vit"), pretrained=False)
    assert teacher.preprocessing == named.preprocessing
    assert teacher.classes == 1000


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 5, 3)), r"returns \(1, 5, 30, 30\) for one image"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)), r"does not run on pixels"),
        (nn.Sequential(nn.Conv2d(1, 5, 3)), r"does not run on pixels of shape \(1, 3, 32, 32\)"),
    ],
)  # fmt: skip
def test_a_module_that_gives_no_scores_is_refused(network, message):
    with pytest.raises(ModelError, match=message):
        load_teacher(network, size=32, **STATISTICS)


def test_names_and_precisions_that_cannot_be():
    for name in ("two words", "a/b", ".hidden"):
        with pytest.raises(UsageError, match="invalid teacher name"):
            load_teacher(small_cnn(), name=name, size=32, **STATISTICS)
    with pytest.raises(UsageError, match="name is only for modules"):
        load_teacher("test_resnet", name="ours")
    with pytest.raises(UsageError, match="precision must be one of"):
        load_teacher(small_cnn(), size=32, precision="int8", **STATISTICS)


def test_a_named_network_takes_other_settings(checkpoint):
    teacher = load_teacher(f"test_resnet={checkpoint}", size=48, mean=(0.1, 0.2, 0.3))
    assert teacher.preprocessing.size == (48, 48)
    assert teacher.preprocessing.mean == (0.1, 0.2, 0.3)
    assert load_teacher("test_resnet", weights=checkpoint).digest == teacher.digest


def test_a_class_map_may_be_given_with_the_teacher(tmp_path):
    names = ["c", "a", "b", "x", "y"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    for class_map in (tuple(names), names, {n: k for k, n in enumerate(names)},
                      tmp_path / "names.txt"):  # fmt: skip
        teacher = load_teacher(small_cnn(), size=32, class_map=class_map, **STATISTICS)
        (fitted,) = teachers.load_teachers([teacher], class_names=("a", "b", "c"))
        assert fitted.columns.tolist() == [1, 2, 0]
    assert teacher.columns is None


def test_a_teacher_can_be_asked_for_other_features_each_time():
    teacher = load_teacher(timm.create_model("test_resnet", num_classes=5), size=32)
    pixels = torch.randn(2, 3, 32, 32)
    before = teacher.logits(pixels)
    for _ in range(2):  # the last activation is taken out of a copy
        (asked,) = teachers.load_teachers([teacher], class_names=(), needs=Needs(pre=True))
        assert (asked.outputs(pixels).pre < 0).any()
        assert torch.equal(teacher.logits(pixels), before)


def test_features_of_a_plain_module_are_refused_by_what_it_lacks():
    teacher = load_teacher(small_cnn(), size=32, **STATISTICS)
    for needs in (Needs(penultimate=True), Needs(pre=True), Needs(final=True), Needs(stages=(1,))):
        with pytest.raises(ModelError, match="Sequential has no forward_features") as raised:
            teachers.load_teachers([teacher], class_names=(), needs=needs)
        assert raised.value.code == "no-layer"


class _WithFeatures(nn.Module):
    """The part of timm's interface that penultimate vectors need."""

    num_features = 7

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 7, 3), nn.Linear(7, 5)

    def forward_features(self, pixels):
        return self.stem(pixels).relu()

    def forward_head(self, features, pre_logits=False):
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self):
        return self.fc

    def forward(self, pixels):
        return self.forward_head(self.forward_features(pixels))


def test_a_module_with_timms_methods_gives_features():
    teacher = load_teacher(_WithFeatures(), size=32, **STATISTICS)
    (asked,) = teachers.load_teachers([teacher], class_names=(), needs=Needs(penultimate=True))
    outputs = asked.outputs(torch.randn(2, 3, 32, 32))
    assert outputs.penultimate.shape == (2, 7)
    torch.testing.assert_close(outputs.logits, asked.module.network.fc(outputs.penultimate))


def test_teachers_of_different_precision_do_not_go_together():
    pair = [
        load_teacher(small_cnn(), size=32, precision=p, **STATISTICS)
        for p in ("float32", "bfloat16")
    ]
    with pytest.raises(UsageError, match="different precisions: bfloat16, float32"):
        teachers.load_teachers(pair, class_names=())


# -- towers without classifier


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_vit2"])
def test_a_file_without_classifier_makes_a_tower(tmp_path, name):
    tower = timm.create_model(name, num_classes=0)
    torch.save(tower.state_dict(), tmp_path / "tower.pth")
    teacher = load_teacher(f"{name}={tmp_path / 'tower.pth'}")
    assert teacher.classes == 0
    (asked,) = teachers.load_teachers([teacher], class_names=(), needs=Needs(penultimate=True))
    pixels = torch.randn(2, 3, *teacher.preprocessing.size)
    with torch.no_grad():
        torch.testing.assert_close(asked.outputs(pixels).penultimate, tower.eval()(pixels))
    with pytest.raises(ModelError, match=r"has no classifier.*--form none --features") as raised:
        teachers.load_teachers([teacher], class_names=CLASSES)
    assert raised.value.code == "no-classifier"


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_small_patch14_dinov2",
                                  "vit_base_patch16_clip_224"])  # fmt: skip
def test_towers_of_timm_give_what_timm_gives(name):
    small = {"depth": 1, "embed_dim": 48, "num_heads": 2, "num_classes": 0, "img_size": 56}
    tower = timm.create_model(name, **small)
    teacher = load_teacher(tower, size=56)
    assert teacher.classes == 0
    (asked,) = teachers.load_teachers([teacher], class_names=(), needs=Needs(penultimate=True))
    pixels = torch.randn(1, 3, *teacher.preprocessing.size)
    with torch.no_grad():
        expected = tower.eval()(pixels)
    torch.testing.assert_close(asked.outputs(pixels).penultimate, expected)


# -- functions named on the command line


def test_a_function_of_the_current_folder(functions):
    spec = models.parse_spec(f"python:{functions}:teacher", allow_python=True)
    teacher = load_teacher(spec)
    assert teacher.facts()["name"] == f"{functions}:teacher"
    assert teacher.facts()["library"] == "python"
    assert teacher.digest == load_teacher(small_cnn(), size=32, **STATISTICS).digest


def test_weights_of_a_function(functions, tmp_path):
    trained = small_cnn(seed=5)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    text = f"python:{functions}:teacher={tmp_path / 'w.safetensors'}"
    teacher = load_teacher(models.parse_spec(text, allow_python=True))
    assert teacher.digest == load_teacher(trained, size=32, **STATISTICS).digest


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere.at_all:f", ModelError, r"no module 'nowhere' is installed or in"),
        ("{}:absent", ModelError, r"has no 'absent'"),
        ("{}:no_module", ModelError, r"returned int, not a torch.nn.Module"),
        ("{}", UsageError, r"write python:PACKAGE.MODULE:FUNCTION"),
        ("{}:", UsageError, r"write python:PACKAGE.MODULE:FUNCTION"),
        ("{}:silent", ModelError, r"give size, mean, std"),
    ],
)
def test_functions_that_do_not_serve(functions, name, error, message):
    with pytest.raises(error, match=message):
        load_teacher(models.parse_spec(f"python:{name.format(functions)}", allow_python=True))


def test_errors_of_the_users_own_code_are_named_with_their_line(functions, tmp_path):
    broken = r"broken raised ZeroDivisionError: division by zero \(.*\.py, line \d+\)"
    with pytest.raises(ModelError, match=broken):
        load_teacher(models.parse_spec(f"python:{functions}:broken", allow_python=True))
    (tmp_path / "imports_more.py").write_text("import something_that_is_not_there\n")
    with pytest.raises(ModelError, match=r"raised ModuleNotFoundError: .*something_that_is_not"):
        load_teacher(models.parse_spec("python:imports_more:f", allow_python=True))


# -- ... and never by anything that may come from others


@pytest.fixture
def hostile(functions, tmp_path):
    """A name whose module leaves a mark when it is imported, and the mark."""
    return f"python:{write_functions(tmp_path, mark='ran')}:teacher", tmp_path / "ran"


def test_only_a_caller_who_says_so_gets_a_function(hostile):
    text, mark = hostile
    for ask in (models.parse_spec, load_teacher):
        with pytest.raises(
            UsageError, match="names code to run, which is allowed only in the arguments"
        ):
            ask(text)
    assert not mark.exists()


def test_the_flag_itself_runs_it(hostile, folder, tmp_path):
    text, mark = hostile
    code, output = invoke("generate", folder, tmp_path / "s", "--teacher", text, "--crops", 1)
    assert (code, mark.exists()) == (0, True), output


@pytest.mark.parametrize("command", ["generate", "fit-basis", "train student", "train teacher"])
@pytest.mark.parametrize("way", ["recipe", "set"])
def test_no_recipe_and_no_set_runs_code(hostile, folder, checkpoint, tmp_path, command, way):
    text, mark = hostile
    verb, _, key = command.partition(" ")
    value = f'["{text}"]' if verb == "generate" else f'"{text}"'
    (tmp_path / "recipe.toml").write_text(f"{key or 'teacher'} = {value}\n")
    given = ["--recipe", tmp_path / "recipe.toml"]
    if way == "set":
        given = ["--set", f"{key or 'teacher'}={value}"]
    rest = {
        "generate": [folder, tmp_path / "s", "--crops", 1],
        "fit-basis": [folder, tmp_path / "b.safetensors"],
        "train student": [folder, "--out", tmp_path / "run", "--epochs", 1],
        "train teacher": [folder, "--out", tmp_path / "run", "--student", "test_resnet",
                          "--method", "kd", "--epochs", 1],
    }[command]  # fmt: skip
    code, output = invoke(verb, *rest, *given)
    assert code == 2, output
    assert "names code to run" in output
    assert not mark.exists()


@pytest.mark.parametrize("command", ["evaluate", "generate", "train", "transfer", "fit-basis"])
def test_no_run_folder_runs_code(hostile, folder, tmp_path, command):
    text, mark = hostile
    run = tmp_path / "run"
    run.mkdir()
    facts = {"student": text, "num_classes": len(CLASSES), "size": [32, 32]}
    weight_files.write_export(run / "student.safetensors", small_cnn(), facts)
    (run / "settings.json").write_text(json.dumps({"settings": {"student": text}, "data": {}}))
    words = {
        "evaluate": [folder, run],
        "generate": [folder, tmp_path / "s", "--crops", 1, "--teacher", run],
        "train": [folder, "--student", run, "--out", tmp_path / "other", "--epochs", 1],
        "transfer": [run, folder, "--epochs", 1],
        "fit-basis": [folder, tmp_path / "b.safetensors", "--teacher", run],
    }[command]
    code, output = invoke(command, *words)
    assert code == 1, output
    assert f"the code runs only if you name it: {text}={run}" in output
    assert not mark.exists()


def test_a_run_folder_does_not_name_its_student_for_the_next_start(hostile, folder, tmp_path):
    text, mark = hostile
    (tmp_path / "run").mkdir()
    record = json.dumps({"settings": {"student": text}, "data": {}})
    (tmp_path / "run" / "settings.json").write_text(record)
    code, output = invoke("train", folder, "--out", tmp_path / "run")
    assert code == 2
    assert "student" in output
    assert not mark.exists()


def test_no_store_runs_code(hostile, folder, tmp_path, monkeypatch):
    text, mark = hostile
    store = tmp_path / "s"
    assert invoke("generate", folder, store, "--teacher", text, "--crops", 1)[0] == 0
    mark.unlink()
    monkeypatch.delitem(sys.modules, text.split(":")[1])  # as in another process
    code, output = invoke("generate", folder, store, "--repair")
    assert code == 2, output
    assert f"--teacher {text}" in output
    for words in (["report", store], ["verify", store, "--full", "--data", folder],
                  ["generate", folder, store]):  # fmt: skip
        invoke(*words)
    assert not mark.exists()


@pytest.mark.parametrize("odd", [None, 3, timm.create_model, [None], {"weight": 1}])
def test_what_is_no_network_is_called_so(odd):
    with pytest.raises(UsageError, match="a network must be a name, a path"):
        load_teacher(odd)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": (3, 32, 32)}, "size must be one side or"),
        ({"size": 32.0}, "size must be one side or"),
        ({"mean": (127, 127, 127)}, "mean must be three numbers from 0 to 1"),
        ({"mean": 0.5}, "mean must be three numbers"),
        ({"std": (0, 0, 0)}, "std must be three numbers above 0"),
        ({"interpolation": "nearest"}, "interpolation must be bilinear or bicubic"),
        ({"device": "tpu"}, "must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(options, words):
    known = {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(UsageError, match=words):
        load_teacher(torch.nn.Sequential(), **{**known, **options})
