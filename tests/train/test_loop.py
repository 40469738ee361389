"""The loop: precision, accumulation, averages, compiling, optimisers, metrics."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from pipeline import losses, make_store, prepare_run, train, train_settings
from safetensors.torch import load_file

from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import TrainingError, UsageError
from fkdpipe.networks import feature_layers
from fkdpipe.networks.feature_layers import FeatureNetwork, Needs
from fkdpipe.train import checkpoint, loop, metrics, optim, parallel, state
from fkdpipe.train.learner import Learner
from fkdpipe.train.methods.fkd import Fkd
from fkdpipe.train.methods.fkd import Settings as FkdSettings
from fkdpipe.train.settings import MixingSettings, OptimizerSettings, ScheduleSettings

# A LayerNorm student: what it says of a crop does not depend on the rest of the batch.
VIT = {"student": "test_vit", "size": 32}


@pytest.fixture(scope="module")
def store(tmp_path_factory, folder, teacher):
    return make_store(tmp_path_factory.mktemp("stores") / "store", folder, [teacher])


def test_accumulated_parts_add_up_to_the_whole_step(tmp_path, folder, store):
    settings = {**VIT, "epochs": 2, "optimizer": OptimizerSettings(clip_norm=0.5, lr=0.1)}
    train(tmp_path / "whole", folder, store, **settings)
    train(tmp_path / "parts", folder, store, **settings, accumulate=3)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=2e-5)


def test_clipping_bounds_the_gradient(tmp_path, folder, store):
    settings = train_settings(optimizer=OptimizerSettings(clip_norm=1e-3, lr=1.0))
    run = prepare_run(tmp_path / "run", folder, store, settings)
    loop.step(run, next(iter(run.crops.stream())))
    norms = [p.grad.norm() for p in run.learner.parameters() if p.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_the_average_of_the_weights_is_what_is_evaluated_and_exported(tmp_path, folder, store):
    run = prepare_run(tmp_path / "run", folder, store, train_settings(ema=0.5, epochs=2))
    seen = []
    plain = loop.step

    def watch(run, batch):
        if not seen:
            seen.append({k: v.clone() for k, v in run.module.network.state_dict().items()})
        made = plain(run, batch)
        seen.append({k: v.clone() for k, v in run.module.network.state_dict().items()})
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "step", watch)
        result = loop.train(run)
    exported = load_file(result.student)
    name = next(k for k, v in exported.items() if v.is_floating_point())
    average = seen[0][name]
    for weights in seen[1:]:
        average = 0.5 * average + 0.5 * weights[name]
    torch.testing.assert_close(exported[name], average)
    assert not torch.equal(exported[name], seen[-1][name])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains(tmp_path, folder, store, precision):
    train(tmp_path / "low", folder, store, **VIT, precision=precision)
    train(tmp_path / "full", folder, store, **VIT)
    low, full = losses(tmp_path / "low"), losses(tmp_path / "full")
    assert low[0] != full[0]
    assert low[0] == pytest.approx(full[0], rel=0.02)  # later steps differ: float16 skips some
    assert np.isfinite(low).all()


def test_a_compiled_student_trains_alike(tmp_path, folder, store):
    train(tmp_path / "eager", folder, store, epochs=2)
    train(tmp_path / "compiled", folder, store, epochs=2, compile="aot_eager")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)


def test_what_cannot_be_compiled_is_refused(tmp_path, folder, store, monkeypatch):
    with pytest.raises(UsageError, match="no backend 'fast'"):
        prepare_run(tmp_path / "a", folder, store, train_settings(compile="fast"))
    monkeypatch.setattr(parallel.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="needs a compiler"):
        prepare_run(tmp_path / "b", folder, store, train_settings(compile="inductor"))
    with pytest.raises(UsageError, match="sync_batchnorm needs GPUs"):
        prepare_run(tmp_path / "c", folder, store, train_settings(sync_batchnorm=True))


def grouped(optimizer: torch.optim.Optimizer) -> dict[tuple[int, ...], dict]:
    return {tuple(p.shape): group for group in optimizer.param_groups for p in group["params"]}


def a_learner() -> Learner:
    return Learner(
        FeatureNetwork(timm.create_model("test_vit", num_classes=5), Needs()), Fkd(FkdSettings())
    )


def test_biases_and_norms_are_spared_where_asked():
    spared = optim.build(a_learner(), OptimizerSettings(name="adamw", decay_all=False))
    assert {len(shape) > 1: group["weight_decay"] for shape, group in grouped(spared).items()}
    for group in spared.param_groups:
        dims = {p.dim() for p in group["params"]}
        if group["weight_decay"]:
            assert 1 not in dims
    everything = optim.build(a_learner(), OptimizerSettings(name="adamw"))
    assert {group["weight_decay"] for group in everything.param_groups} == {1e-4}


def test_layer_decay_slows_the_first_layers():
    made = optim.build(a_learner(), OptimizerSettings(name="adamw", layer_decay=0.5))
    scales = {group["lr_scale"] for group in made.param_groups}
    assert max(scales) == 1.0
    assert min(scales) < 0.5
    assert sum(len(g["params"]) for g in made.param_groups) == len(list(a_learner().parameters()))


def test_auxiliary_modules_have_their_own_rate():
    learner = a_learner()
    learner.method.auxiliary = torch.nn.Linear(3, 3)
    made = optim.build(learner, OptimizerSettings(lr=0.1, auxiliary_lr=0.001))
    assert made.param_groups[-1]["lr_scale"] == pytest.approx(0.01)
    assert {p.dim() for p in made.param_groups[-1]["params"]} == {1, 2}


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb"])
def test_timms_optimisers_go_by_name(name):
    assert optim.build(a_learner(), OptimizerSettings(name=name)).param_groups


def test_settings_an_optimiser_has_not_are_refused():
    with pytest.raises(UsageError, match="no betas"):
        optim.build(a_learner(), OptimizerSettings(name="sgd", betas=(0.9, 0.99)))


def test_checkpoints_are_written_between_passes_and_the_newest_kept(tmp_path, folder, store):
    train(tmp_path / "run", folder, store, checkpoint_every=2, keep_checkpoints=3)
    kept = checkpoint.list_all(tmp_path / "run" / state.CHECKPOINTS)
    assert len(kept) == 3


def test_metrics_go_to_tensorboard_too(tmp_path, folder, store):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", folder, store, epochs=2, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    values = [event.value for event in events.Scalars("train/last_loss")]
    assert values == pytest.approx(losses(tmp_path / "run"), rel=1e-6)
    assert events.Scalars("eval/top1")


def test_an_idle_process_has_no_weight():
    assert float(loop_reduce(torch.ones(4), 0, 4)) == 0.0
    assert float(loop_reduce(torch.tensor(3.0), 0, 4)) == 0.0
    assert float(loop_reduce(torch.tensor(3.0), 8, 4)) == 1.5
    assert float(loop_reduce(torch.ones(4), 8, 4)) == 0.5


def loop_reduce(*arguments) -> torch.Tensor:
    from fkdpipe.train.step import reduce

    return reduce(*arguments)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, folder, store):
    wild = OptimizerSettings(lr=1e30)
    with pytest.raises(TrainingError, match="The last checkpoint is in"):
        train(tmp_path / "run", folder, store, optimizer=wild, epochs=8)
    for file in checkpoint.list_all(tmp_path / "run" / state.CHECKPOINTS):
        held = torch.load(file, weights_only=True)["student"]
        assert all(v.isfinite().all() for v in held.values() if v.is_floating_point())


def test_the_live_teacher_and_its_stored_labels_teach_the_same(
    tmp_path, folder, teacher, checkpoint
):
    """Vanilla KD on the same crops is the oracle of training from stored labels."""
    store = make_store(tmp_path / "store", folder, [teacher], form="full")
    train(tmp_path / "stored", folder, store, **VIT, target="full", method={"name": "kd"})
    live = {"target": "ground-truth", "teacher": f"test_resnet={checkpoint}"}
    train(tmp_path / "live", folder, store, **VIT, **live, method={"name": "kd"})
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "live"), abs=2e-3)


def test_a_live_teacher_sees_the_mixed_images(tmp_path, folder, store, checkpoint):
    settings = {
        "target": "ground-truth",
        "teacher": f"test_resnet={checkpoint}",
        "method": {"name": "kd", "temperature": 2.0, "soft_weight": 0.5},
        "mixing": MixingSettings(mixup=0.8),
    }
    run = prepare_run(tmp_path / "run", folder, store, train_settings(**settings))
    batch = next(iter(run.crops.stream()))
    from fkdpipe.train.step import prepare

    x, wanted = prepare(run, batch)
    torch.testing.assert_close(wanted.teacher.logits, run.teacher.logits(x))
    assert not run.teacher.module.training
    run.learner.train()
    assert not run.teacher.module.training
    loop.train(run)
    assert all(p.grad is None for p in run.teacher.module.parameters())


def test_methods_without_their_teacher_are_refused(tmp_path, folder, store, checkpoint):
    settings = train_settings(target="ground-truth", method={"name": "kd"})
    with pytest.raises(UsageError, match="needs the teacher's probabilities"):
        prepare_run(tmp_path / "a", folder, store, settings)
    with pytest.raises(UsageError, match="does not use --teacher"):
        prepare_run(
            tmp_path / "b", folder, store, train_settings(teacher=f"test_resnet={checkpoint}")
        )


def test_the_rank_is_read_from_torchruns_environment(monkeypatch):
    from fkdpipe.common import distributed

    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert distributed.current() == Rank(3, 8, 1)


def test_single_crops_frame_the_run_at_the_same_batch_size(tmp_path, folder, store):
    schedule = ScheduleSettings(single_first=1, single_last=2)
    train(tmp_path / "run", folder, store, epochs=7, schedule=schedule)
    lines = [x for x in metrics.read(tmp_path / "run" / "metrics.jsonl") if x["kind"] == "train"]
    assert [x["epoch"] for x in lines if x["epoch"] in (0, 5, 6)]
    assert {x["epoch"] for x in lines} == {0, 1, 3, 5, 6}
    written = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert written["settings"]["batch_size"] == 16


def test_feature_layers_give_what_a_method_needs(tmp_path, folder, store):
    run = prepare_run(tmp_path / "run", folder, store, train_settings())
    assert isinstance(run.module, feature_layers.FeatureNetwork)
    assert run.eval_network is run.module
