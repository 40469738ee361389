"""Transfer: new heads, probes and fine-tuning, and a trained backbone in other people's models."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import pytest
import timm
import torch
from conftest import CLASSES
from pipeline import CPU, prepare_run, train_settings
from safetensors.torch import load_file
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead

from fkdpipe.cli import cli
from fkdpipe.common import config
from fkdpipe.common.errors import ImagesError, ModelError, UsageError
from fkdpipe.downstream import transfer
from fkdpipe.downstream.transfer import Row, TransferSettings, Trial
from fkdpipe.networks import models, weight_files
from fkdpipe.train import loop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """A trained network of other classes than the folder's."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("backbone") / "student.safetensors"
    module = timm.create_model("test_resnet", num_classes=11)
    weight_files.write_export(file, module, {"student": "test_resnet", "size": [32, 32]})
    return file


def settings(**changes) -> TransferSettings:
    return TransferSettings(
        **{"epochs": 3, "batch_size": 16, "lr": (0.01,), "threads": 2, **changes}
    )


def test_rates_never_fall_before_the_first_epoch():
    assert [transfer.drops(n) for n in (150, 3, 2, 1)] == [(50, 100), (1, 2), (1,), ()]


def test_a_checkpoint_of_other_classes_needs_a_new_head(tmp_path, folder, backbone):
    model, truth = f"test_resnet={backbone}", {"target": "ground-truth"}
    words = r"does not fit: 2 of another shape \(fc.*than the 5 of this run.* Use --new-head"
    with pytest.raises(ModelError, match=words):
        prepare_run(tmp_path / "a", folder, None, train_settings(student=model, **truth))
    other = train_settings(student=f"test_vit={backbone}", **truth)  # a new head does not help
    with pytest.raises(ModelError, match=r"does not fit: .*\)\.$"):
        prepare_run(tmp_path / "a", folder, None, other)
    given = load_file(backbone)
    wanted = train_settings(student=model, new_head=True, **truth)
    run = prepare_run(tmp_path / "b", folder, None, wanted)
    made = run.module.network.state_dict()
    assert made["fc.weight"].shape == (5, 96)
    assert all(torch.equal(made[k], v) for k, v in given.items() if not k.startswith("fc."))


def test_two_heads_are_both_made_anew(tmp_path):
    """A distilled transformer has two classifiers."""
    torch.manual_seed(0)
    module = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, depth=1)
    weight_files.write_export(tmp_path / "m.safetensors", module, {"options": {"depth": 1}})
    spec = models.parse_spec(f"deit_tiny_distilled_patch16_224={tmp_path / 'm.safetensors'}")
    made = models.build(spec, classes=7, new_head=True).module.state_dict()
    before = module.state_dict()
    for name in ("head.weight", "head_dist.weight"):
        assert not torch.equal(made[name], before[name])
    assert torch.equal(made["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("mode", ["probe", "fine-tune"])
def test_a_probe_trains_the_classifier_alone(tmp_path, folder, backbone, mode):
    given = load_file(backbone)
    trial = settings().trial(f"test_resnet={backbone}", mode, 0.01, seed=0)
    made = load_file(loop.train(prepare_run(tmp_path / "run", folder, None, trial)).student)
    same = {k: torch.equal(made[k], v) for k, v in given.items() if not k.startswith("fc.")}
    if mode == "probe":  # statistics of batch normalisation rest too
        assert all(same.values())
    else:
        assert not same["conv1.0.weight"]
        assert not same["layer4.0.bn1.running_mean"]


def test_the_schedule_is_the_papers():
    trial = TransferSettings().trial("resnet18", "fine-tune", 0.01, seed=2)
    assert (trial.epochs, trial.batch_size, trial.seed) == (150, 64, 2)
    assert (trial.optimizer.name, trial.optimizer.weight_decay) == ("sgd", 5e-4)
    assert (trial.schedule.name, trial.schedule.milestones) == ("step", (50, 100))
    recipe = config.load_toml(ROOT / "recipes" / "transfer-kdep.toml")
    made = config.build(TransferSettings, recipe)
    assert made == TransferSettings(seeds=(0, 1, 2))


def test_several_folders_and_rates_in_one_table(tmp_path, folder, backbone):
    (tmp_path / "other").symlink_to(folder)
    words = [
        "transfer", f"test_resnet={backbone}", str(folder), str(tmp_path / "other"),
        "--mode", "probe", "--lr", "0.01", "--lr", "0.1", "--epochs", "1", "--batch-size", "16",
        "--set", "threads=2", "--device", "cpu", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    runner = click.testing.CliRunner()
    told = runner.invoke(cli, [*words, "--json"])
    assert told.exit_code == 0, told.output
    answer = json.loads(told.stdout)
    assert len(answer["trials"]) == 4
    assert [(row["data"], row["mode"], row["seeds"]) for row in answer["rows"]] == [
        (folder.name, "probe", 1), ("other", "probe", 1),
    ]  # fmt: skip
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("step-*.pt")}
    again = runner.invoke(cli, words)
    assert again.exit_code == 0, again.output
    assert all(f"{row['top1']:.2f}" in again.stdout for row in answer["rows"])
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("step-*.pt")}


def test_the_summary_takes_the_best_mean_rate_of_each_folder_and_mode():
    def trial(data, mode, lr, seed, top1):
        return Trial(data, mode, lr, seed, top1, top5=90.0)

    rows = transfer.summarise([
        trial("a", "probe", 0.1, 0, 50.0), trial("a", "probe", 0.1, 1, 70.0),
        trial("a", "probe", 0.01, 0, 71.0), trial("a", "probe", 0.01, 1, 47.0),
        trial("b", "fine-tune", 0.1, 0, 33.0),
    ])  # fmt: skip
    assert rows == [
        Row("a", "probe", 0.1, 60.0, pytest.approx(200**0.5), 90.0, 2),
        Row("b", "fine-tune", 0.1, 33.0, None, 90.0, 1),
    ]


def test_what_cannot_be_is_refused(tmp_path, folder, backbone):
    with pytest.raises(UsageError, match="seeds: must name each value once"):
        TransferSettings(seeds=(1, 1))
    model = f"test_resnet={backbone}"
    with pytest.raises(ImagesError, match="no val"):
        transfer.transfer(model, [folder / "train"], tmp_path, settings(), device=CPU)
    (tmp_path / folder.name).symlink_to(folder)
    with pytest.raises(UsageError, match="must have distinct names"):
        transfer.transfer(model, [folder, folder], tmp_path, settings(), device=CPU)
    kdep = train_settings(
        method={"name": "kdep"}, train_only="classifier", target="ground-truth",
        teacher=model, teacher_size=32,
    )  # fmt: skip
    with pytest.raises(UsageError, match="does not train the classifier"):
        prepare_run(tmp_path / "run", folder, None, kdep)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_trained_backbone_drops_into_detection_and_segmentation_models(backbone):
    """As docs/guide-transfer.md has it."""
    given = load_file(backbone)
    network = timm.create_model("test_resnet", num_classes=11, checkpoint_path=str(backbone))
    stages = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
    widths = [info["num_chs"] for info in network.feature_info[1:]]
    images = torch.rand(2, 3, 64, 64)

    detector = FasterRCNN(
        BackboneWithFPN(network, stages, widths, 32), num_classes=len(CLASSES) + 1,
        min_size=64, max_size=64,
    )  # fmt: skip
    found = detector.eval()(list(images))
    assert {"boxes", "labels", "scores"} <= set(found[0])
    assert torch.equal(
        detector.state_dict()["backbone.body.conv1.0.weight"], given["conv1.0.weight"]
    )

    body = create_feature_extractor(network, {"layer4": "out"})
    for model in (
        FCN(body, FCNHead(widths[-1], len(CLASSES))),
        DeepLabV3(body, DeepLabHead(widths[-1], len(CLASSES))),
    ):
        assert model.eval()(images)["out"].shape == (2, len(CLASSES), 64, 64)
        name = "backbone.layer4.0.conv1.weight"
        assert torch.equal(model.state_dict()[name], given["layer4.0.conv1.weight"])

    maps = timm.create_model(
        "test_resnet", features_only=True, pretrained=True,
        pretrained_cfg_overlay={"file": str(backbone)},
    )  # fmt: skip
    assert [m.shape[1] for m in maps(images)][-1] == widths[-1]
    assert torch.equal(maps.state_dict()["layer4.0.conv1.weight"], given["layer4.0.conv1.weight"])
