"""Self-supervised teachers (MoCo v2, SwAV), their stored scores, and students of them."""

from __future__ import annotations

import pytest
import torch
import torchvision
import zarr
from conftest import CLASSES
from pipeline import CPU, make_store, prepare_run, train, train_settings
from safetensors.torch import load_file
from torch.nn.functional import normalize

from fkdpipe.common.errors import FkdpipeError, UsageError
from fkdpipe.networks import models, teachers
from fkdpipe.train import loop, metrics


def moco_checkpoint(file) -> torch.nn.Module:
    """As the authors write it: torchvision's ResNet with a head for fc, query and key encoders."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=16)
    network.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), network.fc)
    state = {f"module.encoder_q.{k}": v for k, v in network.state_dict().items()}
    state |= {f"module.encoder_k.{k}": v + 1 for k, v in network.state_dict().items()}
    state["module.queue"] = torch.randn(16, 100)
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": state}, file)
    return network.eval()


class Swav(torch.nn.Module):
    """A slow twin of the authors' network, in their names."""

    def __init__(self) -> None:
        super().__init__()
        network = torchvision.models.resnet18()
        network.fc = torch.nn.Identity()
        for name, module in network.named_children():
            self.add_module(name, module)
        self.projection_head = torch.nn.Sequential(
            torch.nn.Linear(512, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(),
            torch.nn.Linear(32, 8),
        )  # fmt: skip
        self.prototypes = torch.nn.Linear(8, 30, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.prototypes(normalize(self.projection_head(x.mean((2, 3))), dim=1))


def swav_checkpoint(file) -> torch.nn.Module:
    torch.manual_seed(1)
    network = Swav().eval()
    torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, file)
    return network


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("selfsup")
    return {
        "moco": (root / "moco.pth.tar", moco_checkpoint(root / "moco.pth.tar")),
        "swav": (root / "swav.pth", swav_checkpoint(root / "swav.pth")),
    }


def load(kind, files) -> teachers.Teacher:
    spec = models.parse_spec(f"{kind}:resnet18={files[kind][0]}")
    (made,) = teachers.load_teachers([spec], class_names=CLASSES, device=CPU, size=(32, 32))
    return made


@pytest.mark.parametrize("kind", ["moco", "swav"])
def test_the_published_files_give_the_authors_outputs(files, kind):
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        wanted = files[kind][1](x)
        wanted = normalize(wanted, dim=1) if kind == "moco" else wanted
    torch.testing.assert_close(load(kind, files).logits(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "width"), [("moco", 16), ("swav", 30)])
def test_scores_are_stored_before_softmax_and_students_learn_them(
    tmp_path, folder, files, kind, width
):
    store = make_store(tmp_path / "store", folder, [load(kind, files)], form=None)
    (part,) = [part for part in store.parts.values() if part.kind == "labels"]
    assert (str(part.settings.form), part.settings.classes) == ("logits", width)
    method = {"name": "selfsup", "head": kind, "temperature": 0.2, "embedding": 8}
    settings = {"target": "full", "method": method, "epochs": 8}
    run = prepare_run(tmp_path / "look", folder, store, train_settings(**settings))
    batch = next(iter(run.crops.stream()))
    from fkdpipe.train.step import prepare

    _, wanted = prepare(run, batch)
    logits = zarr.open_array(store=store.url, path=f"{part.path}/logit", mode="r")[...]
    stored = torch.from_numpy(logits[batch.rows, batch.crops]).float()
    torch.testing.assert_close(wanted.prob_BC, torch.softmax(stored / 0.2, dim=1))
    result = train(tmp_path / "run", folder, store, **settings)
    losses = [
        x["loss"] for x in metrics.read(tmp_path / "run" / "metrics.jsonl") if x["kind"] == "train"
    ]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert not any("head." in key and "prototypes" in key for key in load_file(result.student))
    models.build(models.parse_spec(str(tmp_path / "run")))  # a plain timm model


def test_the_students_head_trains_and_its_classifier_rests(tmp_path, folder, files):
    store = make_store(tmp_path / "store", folder, [load("moco", files)], form="logits")
    settings = train_settings(target="full", method={"name": "selfsup"})
    run = prepare_run(tmp_path / "run", folder, store, settings)
    loop.step(run, next(iter(run.crops.stream())))
    assert all(p.grad is not None for p in run.method.parameters())
    assert all(p.grad is None for p in run.module.classifier.parameters())


def test_scores_are_no_classes(tmp_path, folder, files):
    store = make_store(tmp_path / "store", folder, [load("moco", files)], form="logits")
    with pytest.raises(UsageError, match="--method selfsup"):
        prepare_run(tmp_path / "run", folder, store, train_settings(target="full"))
    with pytest.raises(UsageError, match="use --form logits"):
        make_store(tmp_path / "other", folder, [load("moco", files)], form="topk:3")


def test_what_is_no_such_checkpoint_is_refused(tmp_path, files):
    with pytest.raises(UsageError, match="give the authors' checkpoint"):
        models.parse_spec("moco:resnet18")
    plain = tmp_path / "plain.pth"
    torch.save(torchvision.models.resnet18().state_dict(), plain)
    with pytest.raises(FkdpipeError, match="no two-layer swav projection head"):
        models.build(models.parse_spec(f"swav:resnet18={plain}"))
