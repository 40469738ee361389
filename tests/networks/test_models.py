"""Models by name: weights that fit or say why not, classes that match or say how to."""

from __future__ import annotations

import argparse
import os

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import CLASSES

from fkdpipe.common.errors import ImagesError, ModelError, UsageError
from fkdpipe.networks import class_maps, features, models, teachers, weight_files
from fkdpipe.networks.models import ModelSpec
from fkdpipe.train.evaluate import read_accepted

CPU = torch.device("cpu")


def save(module, file):
    torch.save(module.state_dict(), file)
    return file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resnet18", ModelSpec("resnet18")),
        ("torchvision:resnet18", ModelSpec("resnet18", "torchvision")),
        ("resnet50.a1_in1k", ModelSpec("resnet50.a1_in1k")),
    ],
)
def test_specs(text, expected):
    assert models.parse_spec(text) == expected
    assert str(expected) == text


def test_an_unknown_name_gets_near_matches():
    with pytest.raises(ModelError, match=r"timm has no model 'resnet19'. Did you mean resnet"):
        models.parse_spec("resnet19")
    with pytest.raises(ModelError, match=r"torchvision has no model 'resnet19'"):
        models.parse_spec("torchvision:resnet19")
    with pytest.raises(UsageError, match="invalid model"):
        models.parse_spec("=file")


def test_a_missing_weights_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no such weights file: .*none.pth"):
        models.parse_spec(f"resnet18={tmp_path / 'none.pth'}")


def test_without_a_network_pretrained_weights_say_what_to_give(monkeypatch):
    with pytest.raises(ModelError, match=r"resnet18=weights.safetensors") as raised:
        models.build(ModelSpec("resnet18"))
    assert raised.value.code == "offline"
    with pytest.raises(ModelError) as raised:
        models.build(ModelSpec("resnet18", "torchvision"))
    assert raised.value.code == "offline"


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_nothing_runs_in_weights_that_torchvision_fetched(tmp_path, monkeypatch):
    """A file in its download cache counts as fetched; torchvision would unpickle it in full."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.get_model_weights("resnet18").DEFAULT.url
    file = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save({"fc.bias": Evil(tmp_path / "ran")}, file)
    with pytest.raises(ModelError, match="UnpicklingError"):
        models.build(ModelSpec("resnet18", "torchvision"))
    assert not (tmp_path / "ran").exists()

    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, file)
    loaded = models.build(ModelSpec("resnet18", "torchvision")).module.state_dict()
    assert torch.equal(loaded["fc.weight"], weights["fc.weight"])
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("wrap", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_local_checkpoints_in_their_usual_wrappings(tmp_path, wrap, prefix):
    module = timm.create_model("test_resnet", num_classes=7)
    state = {prefix + key: value for key, value in module.state_dict().items()}
    torch.save({wrap: state} if wrap else state, tmp_path / "x.pth")
    loaded = models.build(ModelSpec("test_resnet", "timm", tmp_path / "x.pth"))
    assert loaded.classes == 7
    assert torch.equal(loaded.module.fc.weight, module.fc.weight)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_the_class_count_comes_from_the_weights(tmp_path, name):
    file = save(timm.create_model(name, num_classes=11), tmp_path / "x.pth")
    assert models.build(ModelSpec(name, "timm", file)).classes == 11


def test_torchvision_models_bring_their_own_preprocessing(tmp_path):
    module = torchvision.models.get_model("resnet18", num_classes=6)
    file = save(module, tmp_path / "x.pth")
    loaded = models.build(ModelSpec("resnet18", "torchvision", file))
    assert loaded.classes == 6
    assert loaded.preprocessing.size == (224, 224)
    assert loaded.preprocessing.interpolation == "bilinear"
    assert loaded.preprocessing.crop_pct == pytest.approx(224 / 256)


def test_timm_preprocessing_is_its_data_config():
    module = timm.create_model("resnet50")
    config = timm.data.resolve_model_data_config(module)
    loaded = models.build(ModelSpec("resnet50"), pretrained=False)
    assert loaded.preprocessing.size == config["input_size"][1:]
    assert loaded.preprocessing.mean == config["mean"]
    assert loaded.preprocessing.crop_pct == config["crop_pct"]
    assert loaded.preprocessing.interpolation == config["interpolation"]


def test_a_network_with_position_embeddings_is_built_for_the_size():
    loaded = models.build(
        ModelSpec("deit_tiny_patch16_224"), classes=3, size=(64, 64), pretrained=False
    )
    assert loaded.module(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_a_checkpoint_that_does_not_fit_names_keys(tmp_path):
    state = timm.create_model("test_resnet", num_classes=5).state_dict()
    state["surprise"] = torch.zeros(1)
    first = next(iter(state))
    del state[first]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=rf"1 missing \({first}\); 1 unknown \(surprise\)"):
        models.build(ModelSpec("test_resnet", "timm", tmp_path / "x.pth"))
    file = save(timm.create_model("test_resnet", num_classes=5), tmp_path / "y.pth")
    with pytest.raises(ModelError, match=r"2 of another shape \(fc.weight \(5, 96\) for \(9, 96\)"):
        models.build(ModelSpec("test_resnet", "timm", file), classes=9)
    with pytest.raises(ModelError, match="missing"):
        models.build(ModelSpec("test_vit", "timm", file))


class Malicious:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/fkdpipe-was-here",)


def test_no_pickle_is_run(tmp_path):
    import os
    import pickle

    torch.save({"state_dict": Malicious()}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(Malicious()))
    for name in ("x.pth", "y.pth"):
        with pytest.raises(ModelError, match="which are never loaded"):
            models.build(ModelSpec("test_resnet", "timm", tmp_path / name))
    assert not os.path.exists("/tmp/fkdpipe-was-here")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        models.build(ModelSpec("test_resnet", "timm", tmp_path / name))


def test_exports_tell_what_they_are(tmp_path):
    module = timm.create_model("test_resnet", num_classes=4)
    facts = {"student": "test_resnet", "size": [48, 40], "mean": [0.1, 0.2, 0.3], "crop_pct": 0.9}
    weight_files.write_export(tmp_path / "student.safetensors", module, facts)
    spec = models.parse_spec(str(tmp_path))
    assert spec == ModelSpec("test_resnet", "timm", tmp_path / "student.safetensors")
    loaded = models.build(spec)
    assert loaded.preprocessing.size == (48, 40)
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
    assert loaded.preprocessing.crop_pct == 0.9


def test_the_digest_is_of_the_weights_alone(tmp_path):
    module = timm.create_model("test_resnet", num_classes=4)
    file = save(module, tmp_path / "x.pth")
    weight_files.write_export(tmp_path / "y.safetensors", module, {})
    digests = {
        weight_files.state_digest(models.build(ModelSpec("test_resnet", "timm", f)).module)
        for f in (file, tmp_path / "y.safetensors")
    }
    assert digests == {weight_files.state_digest(module)}
    with torch.no_grad():
        module.fc.bias[0] += 1e-7
    assert weight_files.state_digest(module) not in digests


def test_teachers_are_frozen_and_in_eval_mode(teacher):
    assert not teacher.module.training
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert sum(t.weight for t in [teacher]) == 1


def test_shares_are_normalised(checkpoint):
    spec = ModelSpec("test_resnet", "timm", checkpoint)
    pair = teachers.load_teachers([spec, spec], class_names=CLASSES, weights=[3, 1], device=CPU)
    assert [t.weight for t in pair] == [0.75, 0.25]
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(UsageError):
            teachers.load_teachers([spec, spec], class_names=CLASSES, weights=weights, device=CPU)
    with pytest.raises(UsageError, match="precision must be one of"):
        teachers.load_teachers([spec], class_names=CLASSES, precision="int8", device=CPU)


def match(names, outputs, class_map=None):
    return class_maps.match_classes(names, outputs, class_map, teacher="t")


def test_classes_match_by_position_name_or_map():
    assert match(("a", "b"), 2) is None
    assert match((), 1000) is None
    assert match(("a", "b"), 3, ("b", "c", "a")).tolist() == [2, 0]
    assert match(("a", "b"), 2, ("b", "a")).tolist() == [1, 0]
    assert match(("a", "b"), 9, class_map={"a": 4, "b": 8}).tolist() == [4, 8]
    assert match(("a", "b"), 2, class_map={"a": 0, "b": 1}) is None
    synsets = ("n01440764", "n01484850")
    assert match(synsets, 1000).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("names", "outputs", "class_map", "words"),
    [
        (("a", "b"), 1000, None, "has 1000 outputs, the image folder 2 classes"),
        (("a", "b"), 5, ("a", "c"), r"1 classes of the image folder are not among .*\(b\)"),
        (("a",), 5, {"a": 7}, "names output 7, but there are 5, counted from 0"),
        (("a",), 5, {"a": -1}, "names output -1"),
        (("a", "b"), 5, {"a": 1, "b": 1}, r"names output 1 for 2 classes \(a, b\)"),
        (("a", "b"), 3, ("a", "b", "a"), "names 'a' more than once"),
        (("0", "1", "10", "2"), 4, None, "class 2 is '10' in text order, and '2' in natural"),
        (("Zebra", "ant"), 2, None, "class 0 is 'Zebra' in text order, and 'ant' in natural"),
    ],
)
def test_classes_that_cannot_be_matched_are_refused(names, outputs, class_map, words):
    with pytest.raises(ModelError, match=words):
        match(names, outputs, class_map=class_map)


def test_numbered_folders_are_offered_what_fits_them():
    with pytest.raises(ModelError, match=r"Use --numbered if .* or --class-map FILE"):
        match(tuple(sorted(map(str, range(12)))), 12)
    with pytest.raises(ModelError, match=r"order\. Use --class-map FILE"):  # 12 is no output
        match(tuple(sorted(map(str, range(1, 13)))), 12)
    assert match(("00", "01", "10"), 3) is None
    assert match(("crane", "tench"), 4, ("kite", "kite", "tench", "crane")).tolist() == [3, 2]


def test_numbered_outputs_are_taken_by_number(tmp_path):
    torch.manual_seed(0)
    file = save(timm.create_model("test_resnet", num_classes=12), tmp_path / "x.pth")
    spec, names = ModelSpec("test_resnet", "timm", file), sorted(map(str, range(12)))
    (teacher,) = teachers.load_teachers([spec], class_names=names, numbered=True, device=CPU)
    assert teacher.columns.tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(UsageError, match="exclude each other"):
        teachers.load_teachers(
            [spec], class_names=names, numbered=True, class_maps=[tuple(names)], device=CPU
        )


def test_slicing_outputs_renormalises_them(checkpoint):
    spec = ModelSpec("test_resnet", "timm", checkpoint)
    (whole,) = teachers.load_teachers([spec], class_names=CLASSES, device=CPU)
    (part,) = teachers.load_teachers(
        [spec], class_names=("x", "y"), class_maps=[{"x": 3, "y": 1}], device=CPU
    )
    x = torch.randn(6, 3, 32, 32)
    prob = whole.logits(x).softmax(1)[:, [3, 1]]
    expected = prob / prob.sum(1, keepdim=True)
    assert np.allclose(part.logits(x).softmax(1), expected, atol=1e-6)


def test_class_maps(tmp_path):
    file = tmp_path / "map.txt"
    file.write_text("# folder class and output\ntench 0\ngolden fish\t1\n")
    assert class_maps.read(file) == {"tench": 0, "golden fish": 1}
    file.write_text("tench\ngolden fish\n")
    assert class_maps.read(file) == ("tench", "golden fish")
    file.write_text("tench 0\ngoldfish\n")
    with pytest.raises(UsageError, match="either one class name per line"):
        class_maps.read(file)
    with pytest.raises(UsageError, match="cannot be read"):
        class_maps.read(tmp_path / "none.txt")


PAIRS = {"tench": 0, "great white, or shark": 1}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufefftench\ngoldfish\n", ("tench", "goldfish")),
        ('tench,0\n"great white, or shark",1\n', PAIRS),
        ('class,index\r\ntench, 0\r\n"great white, or shark", 1\r\n', PAIRS),
        ('0,tench\n1,"great white, or shark"\n', PAIRS),
        ("tench, Tinca tinca\nkite, bird\n", ("tench, Tinca tinca", "kite, bird")),
        ('["tench", "goldfish"]', ("tench", "goldfish")),
        ('\ufeff{"tench": 0, "great white, or shark": 1}', PAIRS),
        ('{"0": "tench", "1": "great white, or shark"}', PAIRS),
        ('{"1": ["great white, or shark", "x"], "0": ["tench", "y"]}', PAIRS),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_class_maps_as_programs_write_them(tmp_path, content, expected, encoding):
    file = tmp_path / "map"
    file.write_text(content.removeprefix("\ufeff") if "16" in encoding else content, encoding)
    assert class_maps.read(file) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tench 0\nkite 1\ntench 2\n", "names 'tench' more than once"),
        ("tench,0\ntench,1\n", "names 'tench' more than once"),
        ('{"tench": 0, "tench": 1}', "names 'tench' more than once"),
        ('{"tench": 0.5}', "or it is JSON: a list of names"),
        ('{"tench": 0', "cannot be read"),
        ("", "either one class name per line"),
    ],
)
def test_class_maps_that_say_nothing_certain_are_refused(tmp_path, content, words):
    (tmp_path / "map").write_text(content)
    with pytest.raises(UsageError, match=words):
        class_maps.read(tmp_path / "map")


def network_and_average():
    torch.manual_seed(0)
    return (timm.create_model("test_resnet", num_classes=5) for _ in range(2))


def prefixed(module, prefix):
    return {f"{prefix}{key}": value for key, value in module.state_dict().items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod."])
def test_timms_own_training_checkpoints_are_read(tmp_path, prefix, caplog):
    network, average = network_and_average()
    file = tmp_path / "model_best.pth.tar"
    optimizer = torch.optim.AdamW(network.parameters())
    content = {
        "epoch": 3, "arch": "test_resnet", "version": 2, "metric": 71.5,
        "args": argparse.Namespace(model="test_resnet", lr=0.1, mean=None, betas=(0.9, 0.99)),
        "state_dict": prefixed(network, prefix), "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    torch.save(content, file)
    for loaded in (
        models.build(models.parse_spec(f"test_resnet={file}")).module,
        models.build(models.parse_spec(f"test_resnet={file}#state_dict")).module,
    ):
        assert weight_files.state_digest(loaded) == weight_files.state_digest(network)
    assert not caplog.messages
    torch.save({**content, "state_dict_ema": prefixed(average, prefix)}, file)
    loaded = models.build(models.parse_spec(f"test_resnet={file}")).module
    assert weight_files.state_digest(loaded) == weight_files.state_digest(average)
    assert f"write {file}#state_dict" in caplog.text
    loaded = models.build(models.parse_spec(f"test_resnet={file}#state_dict")).module
    assert weight_files.state_digest(loaded) == weight_files.state_digest(network)


def test_a_namespace_may_hold_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    file = tmp_path / "hostile.pth"
    network, _ = network_and_average()
    torch.save({"state_dict": network.state_dict(), "args": argparse.Namespace(a=Hostile())}, file)
    with pytest.raises(ModelError, match=r"other objects \(posix.mkdir\), which are never loaded"):
        weight_files.read_weights(file)
    assert not (tmp_path / "made").exists()


def test_files_without_counters_of_batches_are_loaded(tmp_path):
    network, _ = network_and_average()
    state = {k: v for k, v in network.state_dict().items() if "num_batches_tracked" not in k}
    assert len(state) < len(network.state_dict())
    torch.save(state, tmp_path / "old.pth")
    loaded = models.build(models.parse_spec(f"test_resnet={tmp_path / 'old.pth'}")).module
    assert weight_files.state_digest(loaded) == weight_files.state_digest(network)


def test_the_entries_of_a_file_are_named_where_none_is_a_state_dict(tmp_path):
    network, _ = network_and_average()
    file = tmp_path / "own#1.pth"
    torch.save({"epoch": 3, "net": network.state_dict()}, file)
    with pytest.raises(ModelError, match=r"entries epoch, net; for one of net, write .*#ENTRY"):
        weight_files.read_weights(file)
    with pytest.raises(ModelError, match=r"#nets does not contain a state dict"):
        weight_files.read_weights(tmp_path / "own#1.pth#nets")
    assert len(weight_files.read_weights(tmp_path / "own#1.pth#net")) == len(network.state_dict())
    with pytest.raises(ModelError, match="no such weights file"):
        models.parse_spec(f"test_resnet={tmp_path / 'none.pth#net'}")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "student.safetensors"])
def test_a_git_lfs_pointer_is_called_one(tmp_path, name):
    file = tmp_path / name
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 102400\n")
    spec = str(tmp_path) if name == "student.safetensors" else f"test_resnet={file}"
    with pytest.raises(ModelError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        models.build(models.parse_spec(spec))
    with pytest.raises(ModelError, match="is a git-lfs pointer"):
        features.load_basis(file)
    with pytest.raises(UsageError, match="is a git-lfs pointer"):
        class_maps.read(file)
    with pytest.raises(ImagesError, match="is a git-lfs pointer"):
        read_accepted(file, None)


@pytest.mark.parametrize("options", [{"in_chans": 1}, {"in_chans": 4}])
def test_a_network_of_other_channels_than_three_is_refused(options):
    with pytest.raises(ModelError, match=r"in_chans = [14], and images have 3 channels"):
        models.build(ModelSpec("test_resnet"), pretrained=False, options=options)
    loaded = models.build(ModelSpec("test_resnet"), pretrained=False, options={"in_chans": 3})
    assert loaded.classes == 1000


def test_advice_to_run_a_file_is_never_passed_on(tmp_path):
    module = timm.create_model("test_resnet", num_classes=5)
    torch.save(module, tmp_path / "whole.pth")
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    for name in ("whole.pth", "broken.pth"):
        with pytest.raises(
            ModelError, match=r"which are never loaded\. Save only the state_dict"
        ) as raised:
            models.read_weights(tmp_path / name)
        assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "cache_dir"])
def test_options_that_name_files_are_refused(tmp_path, name):
    """They may come from a weight file of others, and timm would read what they name."""
    module = timm.create_model("test_resnet")
    file = tmp_path / "student.safetensors"
    facts = {"student": "test_resnet", "options": {name: str(tmp_path / "hostile.pth")}}
    weight_files.write_export(file, module, facts)
    with pytest.raises(ModelError, match=f"the option {name} is not taken"):
        models.build(models.parse_spec(str(tmp_path)))
