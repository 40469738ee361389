"""What every method keeps to. A new method is one entry in `CASES`.

Tiny networks on real crops, so that what is asked of the run (needs, live teacher, stored labels)
is what a user's run would give.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
from conftest import CLASSES
from pipeline import make_store, prepare_run, train_settings
from safetensors.torch import load_file

from fkdpipe.common import config
from fkdpipe.networks import weight_files
from fkdpipe.train import checkpoint, loop, metrics, state
from fkdpipe.train import methods as table
from fkdpipe.train import step as steps
from fkdpipe.train.settings import OptimizerSettings

METHODS = sorted(table.METHODS)


@dataclass(frozen=True)
class Case:
    """A method at its smallest.

    settings: of the method. teacher: family of the live teacher, None where stored labels are
    enough. still: settings without randomness, so that numbers can be compared between two calls.
    form: of the stored labels. target: what is made of them.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    still: dict[str, Any] = field(default_factory=dict)
    form: str = "topk:3"
    target: str = "marginal-smoothing:3"


_DPK_STAGE = {
    "stage": 2, "encoder_width": 32, "encoder_depth": 1, "encoder_heads": 2,
    "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip

CASES = {
    "fkd": Case({"soft_weight": 0.5}),
    "kd": Case({"soft_weight": 0.5}, "resnet"),
    "fitnet": Case({"stages": [1, 2], "soft_weight": 1.0}, "resnet"),
    "dpk": Case(
        {"stages": [_DPK_STAGE]},
        "resnet",
        {"ratio": "fixed", "fixed_ratio": 0.75, "mask": "grid"},
    ),
    "kdep": Case({"alignment": "conv-pre"}, "resnet"),
    "meal": Case({"shrink": 1}),
    "scalekd": Case({}, "swin"),
    "selfsup": Case({"hidden": 16}, form="logits", target="full"),
    "srd": Case({}, "resnet"),
}


def test_every_method_has_an_entry():
    assert set(CASES) == set(METHODS)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny networks: threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, folder, teacher):
    """By form."""
    place = tmp_path_factory.mktemp("stores")
    forms = sorted({case.form for case in CASES.values()})
    return {
        form: make_store(place / form.replace(":", "-"), folder, [teacher], form=form)
        for form in forms
    }


@pytest.fixture
def store(stores, name):
    return stores[CASES[name].form]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """family -> NAME=FILE of a tiny teacher."""
    place = tmp_path_factory.mktemp("teachers")
    made: dict[str, str] = {}

    def of(family: str) -> str:
        if family not in made:
            name, extra, side = tiny.NETWORKS[family]
            file = place / f"{family}.safetensors"
            facts = {"student": name, "options": extra, "size": [side, side]}
            weight_files.write_export(file, tiny.network(family, classes=len(CLASSES)), facts)
            made[family] = f"{name}={file}"
        return made[family]

    return of


@pytest.fixture
def settings(weights):
    """settings(name, **changes) of a run; `still` takes the method's settings without chance."""

    def make(name: str, *, still: bool = False, **changes):
        case = CASES[name]
        method = {"name": name, **case.settings, **(case.still if still else {})}
        return train_settings(
            method=method,
            teacher=weights(case.teacher) if case.teacher else None,
            label_temperature=None,
            **{
                "target": "ground-truth" if case.teacher else case.target,
                "size": 64,
                "epochs": 1,
                "crops_per_image": 2,
                "optimizer": OptimizerSettings("sgd", lr=1e-3),
                **changes,
            },
        )

    return make


def first(run):
    """Pixels and targets of the first batch."""
    return steps.prepare(run, next(iter(run.crops.stream())))


def total(run, pixels, wanted) -> torch.Tensor:
    _, terms = run.learner(pixels, wanted)
    return sum(term.mean() for term in terms.values())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_everything_trained_and_nothing_of_the_teacher(
    tmp_path, folder, store, settings, name
):
    run = prepare_run(tmp_path / "run", folder, store, settings(name))
    run.learner.train()
    pixels, wanted = first(run)
    total(run, pixels, wanted).backward()
    trained = {n: p for n, p in run.learner.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
    optimised = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trained.values()}
    if run.teacher is not None:
        module = run.teacher.module
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
        assert not any(part.training for part in module.modules())
        assert not {id(p) for p in module.parameters()} & optimised


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_finite_where_teacher_probabilities_are_zero(
    tmp_path, folder, store, settings, name
):
    run = prepare_run(tmp_path / "run", folder, store, settings(name))
    run.learner.train()
    pixels, wanted = first(run)
    certain = wanted.truth_BC
    wanted = dataclasses.replace(wanted, prob_BC=certain)
    if wanted.teacher is not None and wanted.teacher.logits.shape[1]:
        teacher = dataclasses.replace(wanted.teacher, logits=1e4 * certain)
        wanted = dataclasses.replace(wanted, teacher=teacher)
        assert (wanted.soft(1.0) == 0).any()
    loss = total(run, pixels, wanted)
    loss.backward()
    assert torch.isfinite(loss)
    grads = [p.grad for p in run.learner.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_a_batch_does_not_matter(tmp_path, folder, store, settings, name):
    run = prepare_run(tmp_path / "run", folder, store, settings(name, still=True))
    run.learner.train()
    pixels, wanted = first(run)
    order = torch.randperm(len(pixels))
    with torch.no_grad():
        plain = total(run, pixels, wanted)
        moved = total(run, pixels[order], rearranged(wanted, order))
    assert moved.item() == pytest.approx(plain.item(), rel=1e-4)


def rearranged(value: Any, order: torch.Tensor) -> Any:
    """A dataclass of batches in another order."""
    if torch.is_tensor(value):
        return value[order]
    if dataclasses.is_dataclass(value):
        pairs = {
            f.name: rearranged(getattr(value, f.name), order) for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **pairs)
    if isinstance(value, dict):
        return {key: rearranged(item, order) for key, item in value.items()}
    return value


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_ends_with_the_very_same_weights_and_exports_the_student_alone(
    tmp_path, folder, store, settings, monkeypatch, name
):
    wanted = settings(name, epochs=2, batch_size=24)
    whole = prepare_run(tmp_path / "whole", folder, store, wanted)
    result = loop.train(whole)
    run = prepare_run(tmp_path / "run", folder, store, wanted)
    plain = loop.step

    def stop(run, batch):
        if run.step == 2:
            state.save(run)
            raise KeyboardInterrupt
        return plain(run, batch)

    monkeypatch.setattr(loop, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        loop.train(run)
    monkeypatch.undo()
    again = prepare_run(tmp_path / "run", folder, store, wanted)
    resumed = loop.train(again)
    assert result.steps > 3
    assert same(load_file(result.student), load_file(resumed.student))
    assert same(whole.method.state_dict(), again.method.state_dict())
    auxiliary = checkpoint.load_latest(tmp_path / "run" / state.CHECKPOINTS)["method"]
    assert same(auxiliary, again.method.state_dict())
    if again.teacher is not None:
        assert not again.teacher.module.training
    student = timm.create_model(
        "test_resnet", num_classes=len(CLASSES), checkpoint_path=str(result.student)
    )
    assert load_file(result.student).keys() == student.state_dict().keys()
    counted = json.loads((tmp_path / "run" / "settings.json").read_text())["parameters"]
    assert counted["student"] == sum(p.numel() for p in student.parameters())
    assert counted["auxiliary"] == sum(p.numel() for p in again.method.parameters())


@pytest.mark.parametrize("name", ["dpk", "fitnet", "kd", "scalekd", "srd"])
def test_labels_may_come_from_the_store_beside_a_live_teacher(
    tmp_path, folder, store, settings, name
):
    wanted = settings(name, target="marginal-smoothing:3")
    run = prepare_run(tmp_path / "run", folder, store, wanted)
    run.learner.train()
    pixels, given = first(run)
    assert run.teacher is not None
    assert torch.equal(given.soft(1.0), given.prob_BC)
    moved = dataclasses.replace(given.teacher, logits=torch.zeros_like(given.teacher.logits))
    torch.manual_seed(0)
    before = total(run, pixels, given)
    torch.manual_seed(0)
    assert total(run, pixels, dataclasses.replace(given, teacher=moved)) == before


@pytest.mark.parametrize("name", METHODS)
def test_lower_precision_and_accumulation_train(tmp_path, folder, store, settings, name):
    wanted = settings(name, precision="bfloat16", accumulate=2, batch_size=24)
    result = train_with(tmp_path / "run", folder, store, wanted)
    assert result.steps > 0


def train_with(out: Path, folder: Path, store, wanted) -> loop.Result:
    return loop.train(prepare_run(out, folder, store, wanted))


def losses(out: Path) -> list[float]:
    return [x["last_loss"] for x in metrics.read(out / "metrics.jsonl") if x["kind"] == "train"]


# DPK's mask ratio ends a graph, and the compiler's look at the next one's inputs warns.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_compiled_steps_train_alike(tmp_path, folder, store, settings, name):
    for place, backend in (("eager", None), ("compiled", "aot_eager")):
        torch._dynamo.reset()
        train_with(tmp_path / place, folder, store, settings(name, compile=backend, batch_size=24))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_every_method(tmp_path, folder, stores, settings):
    """Their gradients meet: both end at the same weights, also of the auxiliary modules."""
    recipes = {
        name: [
            str(tmp_path / CASES[name].form),
            config.to_table(settings(name, threads=1, batch_size=24)),
        ]
        for name in METHODS
    }
    for form, store in stores.items():
        (tmp_path / form).symlink_to(store.location.url)
    (tmp_path / "recipes.json").write_text(json.dumps(recipes))
    script = tmp_path / "two.py"
    script.write_text(TWO)
    line = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(script), str(folder), str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(line, env={**os.environ, **PYTHON}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in METHODS:
        ours, theirs = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert same(ours, theirs), name
        assert len(losses(tmp_path / name)) > 0


PYTHON = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
TWO = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from fkdpipe.common import config, distributed
from fkdpipe.storage.store import open_store
from fkdpipe.train import loop, parallel, run
from fkdpipe.train.settings import TrainSettings

data, out = Path(sys.argv[1]), Path(sys.argv[2])
cpu, rank = torch.device("cpu"), distributed.current()
with parallel.group(rank, cpu):
    for name, (store, table) in json.loads((out / "recipes.json").read_text()).items():
        made = run.prepare(
            config.build(TrainSettings, table), data, out / name,
            store=open_store(store), cache_dir=out / "cache", device=cpu, rank=rank,
        )
        loop.train(made)
        trained = {k: p.detach().contiguous() for k, p in made.learner.named_parameters()}
        save_file(trained, out / f"{name}-{rank.index}.safetensors")
"""
