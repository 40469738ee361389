"""Phase 2: it learns from the labels, needs no teacher, resumes bit by bit, exports plainly."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, load_teacher
from pipeline import make_store, prepare_run, train, train_settings
from safetensors.torch import load_file

from fkdpipe.common.errors import ImagesError, TrainingError, UsageError
from fkdpipe.networks import class_maps, models
from fkdpipe.pixels import images
from fkdpipe.pixels.replay import normalise
from fkdpipe.train import checkpoint, loop, metrics
from fkdpipe.train import evaluate as evaluation
from fkdpipe.train.evaluate import accuracy, batches
from fkdpipe.train.settings import OptimizerSettings


@pytest.fixture(scope="module")
def store(tmp_path_factory, folder, teacher):
    return make_store(tmp_path_factory.mktemp("s") / "store", folder, [teacher])


def weights(result) -> dict[str, torch.Tensor]:
    return load_file(result.student)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_what_it_says(tmp_path, folder, store):
    result = train(tmp_path / "run", folder, store)
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    evals = [line for line in lines if line["kind"] == "eval"]
    assert len(steps) == result.steps == -(-store.num_images * 4 // 16)
    assert {"loss", "lr", "images_per_s", "crops_per_s", "wait_share"} <= steps[0].keys()
    assert evals[-1]["top1"] == result.top1
    assert 0 <= result.top1 <= 100
    record = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert record["settings"]["student"] == "test_resnet"
    assert record["class_names"] == sorted(CLASSES)
    assert len(checkpoint.list_all(tmp_path / "run" / "checkpoints")) == 2


def test_a_finished_run_started_again_tells_its_accuracy(tmp_path, folder, store):
    done = train(tmp_path / "run", folder, store)
    again = train(tmp_path / "run", folder, store)
    assert done.top1 is not None
    assert (again.steps, again.top1, again.top5) == (done.steps, done.top1, done.top5)


def test_files_that_are_left_out_are_named(tmp_path, folder, caplog):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    (data / "train" / "ash" / "notes.jpg").write_text("text")
    train(tmp_path / "run", data, None, target="ground-truth", epochs=1)
    assert "ash/notes.jpg is left out: not-an-image" in caplog.text


def test_the_learning_rate_is_set_per_pass(tmp_path, folder, store):
    """Serrated: one rate for a whole pass of m epochs."""
    train(tmp_path / "run", folder, store, batch_size=2, epochs=4, log_every=1)
    lines = [x for x in metrics.read(tmp_path / "run" / "metrics.jsonl") if x["kind"] == "train"]
    half = store.num_images
    assert {x["lr"] for x in lines[:half]} == {0.02}
    (second,) = {x["lr"] for x in lines[half:]}
    assert second == pytest.approx(0.01)


@pytest.mark.parametrize("stop_at", [1, 5, 9])
def test_a_stopped_run_ends_with_the_very_same_weights(
    tmp_path, folder, store, monkeypatch, stop_at
):
    settings = {"student_options": {"drop_path_rate": 0.2}}
    whole = train(tmp_path / "whole", folder, store, **settings)
    run = prepare_run(tmp_path / "run", folder, store, train_settings(**settings))
    plain = loop.step

    def stop(run, batch):
        if run.step == stop_at:
            loop.save(run)
            raise KeyboardInterrupt
        return plain(run, batch)

    monkeypatch.setattr(loop, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        loop.train(run)
    monkeypatch.undo()
    rest = train(tmp_path / "run", folder, store, **settings)
    assert same(weights(whole), weights(rest))
    losses = [
        [x["last_loss"] for x in metrics.read(tmp_path / name / "metrics.jsonl") if "lr" in x]
        for name in ("whole", "run")
    ]
    assert losses[0] == losses[1]


def test_the_student_learns_the_teacher_and_labels_matter(tmp_path, folder, store):
    """Trained on its own labels the student follows the teacher; trained on the same labels
    shuffled between images it does not. Agreement is measured on the training crops."""
    longer = {"epochs": 60, "optimizer": OptimizerSettings("adamw", lr=3e-3, weight_decay=0.0)}
    shuffled = tmp_path / "shuffled-store"
    shutil.copytree(store.url, shuffled)
    shuffle_labels(shuffled)
    from fkdpipe.storage.store import open_store

    agreement = {}
    for name, place in (("right", store), ("shuffled", open_store(shuffled))):
        run = prepare_run(tmp_path / name, folder, place, train_settings(**longer))
        loop.train(run)
        agreement[name] = agree(run, folder, store, tmp_path)
    assert agreement["right"] > 0.8
    assert agreement["shuffled"] < 0.45


def shuffle_labels(place) -> None:
    """Exchange the label rows between images, honestly committed."""
    from fkdpipe.storage import writer
    from fkdpipe.storage.store import open_store

    store = open_store(place)
    part = store.part("rounds/0/labels/t")
    order = np.random.default_rng(0).permutation(store.num_images)
    values = {}
    for field in part.fields:
        values[field.name] = store.read(part, field.name, 0)[order]
    writer.commit_unit(store, part, 0, values)
    writer.seal(store, part)


def agree(run, folder, store, tmp_path) -> float:
    """Share of recorded crops where the student's first class is the teacher's."""
    target = prepare_run(tmp_path / "look", folder, store, train_settings(target="hard", epochs=2))
    hits = total = 0
    run.module.eval()
    for batch in target.crops.stream():
        with torch.no_grad():
            logits = run.module(batch.pixels).logits
        hits += int((logits.argmax(1) == batch.labels.argmax(1)).sum())
        total += len(batch.rows)
    return hits / total


def test_training_needs_no_teacher(tmp_path, folder, checkpoint, teacher):
    """A fresh process, the weights deleted; it never imports labelgen nor loads a teacher."""
    local = tmp_path / "teacher.safetensors"
    shutil.copy(checkpoint, local)
    make_store(tmp_path / "store", folder, [teacher])
    local.unlink()
    code = f"""
import sys
from fkdpipe import cli
from fkdpipe.networks import teachers
teachers.load_teachers = None
cli.cli(["train", {str(folder)!r}, {str(tmp_path / "store")!r}, "--student", "test_resnet",
    "--target", "marginal-smoothing:3", "--size", "32", "--epochs", "1", "--batch-size", "16",
    "--out", {str(tmp_path / "run")!r}], standalone_mode=False)
assert not [name for name in sys.modules if name.startswith("fkdpipe.labelgen")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "student:" in done.stdout


def test_the_exported_student_is_a_plain_timm_model(tmp_path, folder, store):
    result = train(tmp_path / "run", folder, store, epochs=2)
    plain = timm.create_model(
        "test_resnet", num_classes=len(CLASSES), checkpoint_path=str(result.student)
    ).eval()
    loaded = models.build(models.parse_spec(str(tmp_path / "run")))
    assert loaded.class_names == tuple(sorted(CLASSES))
    assert loaded.preprocessing.size == (32, 32)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain(x), loaded.module.eval()(x))


def test_evaluate_agrees_with_timms_own_pipeline(tmp_path, folder, store):
    """timm 1.0: create_transform, ImageFolder order, argmax; to the last image."""
    from timm.data import create_transform
    from torchvision.datasets import ImageFolder

    result = train(tmp_path / "run", folder, store, epochs=2)
    loaded = models.build(models.parse_spec(str(tmp_path / "run")))
    p = loaded.preprocessing
    transform = create_transform(
        (3, *p.size),
        is_training=False,
        interpolation=p.interpolation,
        mean=p.mean,
        std=p.std,
        crop_pct=p.crop_pct,
    )
    theirs = ImageFolder(str(folder / "val"), transform)
    module = loaded.module.eval()
    with torch.no_grad():
        logits = module(torch.stack([x for x, _ in theirs]))
    truth = torch.tensor(theirs.targets)
    held_out = images.scan(folder, split="val")
    made = accuracy(module, p, held_out, device=torch.device("cpu"))
    assert made.top1 == pytest.approx(100 * (logits.argmax(1) == truth).float().mean().item())
    assert made.top1 == pytest.approx(result.top1)
    assert made.top5 == 100  # of five classes
    assert made.images == len(theirs)
    ours = torch.cat([x for x, _ in batches(p, held_out, batch=4, threads=2)])
    from fkdpipe.pixels.replay import normalise

    assert torch.equal(normalise(ours, p.mean, p.std), torch.stack([x for x, _ in theirs]))


def test_other_settings_in_the_same_run_folder_are_refused(tmp_path, folder, store, checkpoint):
    train(tmp_path / "run", folder, store, epochs=2)
    with pytest.raises(TrainingError, match=r"settings: optimizer.lr: 0.02, now 0.5"):
        train(tmp_path / "run", folder, store, epochs=2, optimizer=OptimizerSettings("sgd", lr=0.5))
    other = make_store(tmp_path / "other", folder, [load_teacher(checkpoint)], seed=5)
    with pytest.raises(TrainingError, match="different images, crops or labels"):
        train(tmp_path / "run", folder, other, epochs=2)
    again = train(tmp_path / "run", folder, store, epochs=2, threads=1, eval_every=2)
    assert again.steps == -(-store.num_images * 2 // 16)


def test_a_damaged_checkpoint_is_named(tmp_path, folder, store):
    train(tmp_path / "run", folder, store, epochs=2)
    newest = checkpoint.list_all(tmp_path / "run" / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=newest.name):
        train(tmp_path / "run", folder, store, epochs=2)


def test_an_infinite_loss_stops_with_a_message(tmp_path, folder, store):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step"):
        train(
            tmp_path / "run",
            folder,
            store,
            epochs=40,
            optimizer=OptimizerSettings("sgd", lr=1e30),
        )


def test_training_from_a_checkpoint_starts_there(tmp_path, folder, store, checkpoint):
    run = prepare_run(
        tmp_path / "run", folder, store, train_settings(student=f"test_resnet={checkpoint}")
    )
    assert same(run.module.network.state_dict(), load_file(checkpoint))


def test_ground_truth_without_a_store(tmp_path, folder):
    result = train(tmp_path / "run", folder, None, target="ground-truth", epochs=2)
    assert result.steps > 0
    with pytest.raises(UsageError, match="needs a store of labels"):
        train(tmp_path / "other", folder, None, target="hard")


def test_without_held_out_images_there_is_no_accuracy(tmp_path, folder):
    data = tmp_path / "data"
    shutil.copytree(folder / "train", data)
    result = train(tmp_path / "run", data, None, target="ground-truth", epochs=1)
    assert result.top1 is None
    assert result.student.is_file()


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_any_timm_optimiser(tmp_path, folder, store, name):
    result = train(
        tmp_path / "run", folder, store, epochs=2, optimizer=OptimizerSettings(name, lr=1e-3)
    )
    assert result.steps > 0


def test_an_unknown_optimiser_is_refused(tmp_path, folder, store):
    with pytest.raises(UsageError, match="timm has no optimiser 'sdg'"):
        train(tmp_path / "run", folder, store, optimizer=OptimizerSettings("sdg"))


def test_several_classes_may_be_right(tmp_path, folder, checkpoint):
    """ImageNet-ReaL: right is one of a list; images without a right class are left out."""
    held_out = images.scan(folder, split="val")
    loaded = models.build(models.parse_spec(f"test_resnet={checkpoint}"))
    with torch.no_grad():
        p = loaded.preprocessing
        scores = torch.cat(
            [
                loaded.module.eval()(normalise(x, p.mean, p.std))
                for x, _ in batches(p, held_out, batch=4, threads=2)
            ]
        )
    best = scores.argmax(1).tolist()
    wrong = [(c + 1) % 5 for c in best]
    sets = [[b, w] if k % 2 else [w] for k, (b, w) in enumerate(zip(best, wrong, strict=True))]
    sets[0] = []
    by_name = sorted(range(len(held_out)), key=lambda row: held_out.keys[row].rsplit("/", 1)[-1])
    file = tmp_path / "real.json"
    file.write_text(json.dumps([sets[row] for row in by_name]))
    accepted = evaluation.read_accepted(file, held_out)
    assert [sorted(a) for a in accepted] == [sorted(s) for s in sets]
    made = accuracy(
        loaded.module, p, held_out, device=torch.device("cpu"), accepted=accepted, batch_size=3
    )
    assert made.images == 9
    assert made.top1 == pytest.approx(100 * 5 / 9)
    assert made.top5 == 100.0
    file.write_text("[[1], [2], [3]]")
    with pytest.raises(ImagesError, match="labels for 3 images"):
        evaluation.read_accepted(file, held_out)


def test_folders_named_by_index_are_matched_by_number():
    names = [str(k) for k in sorted(range(12), key=str)]
    columns = class_maps.match_classes(
        names, 1000, class_maps.numbered_classes(names), teacher="a network"
    )
    assert columns.tolist() == [int(name) for name in names]
    with pytest.raises(UsageError, match="named by class index"):
        class_maps.numbered_classes(["1", "ash"])
