"""The command line: instant help, examples that run, every mistake one clear line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner
from conftest import CLASSES

from fkdpipe.cli import cli
from fkdpipe.commands import bars
from fkdpipe.common.errors import TrainingError

COMMANDS = sorted(cli.commands)


def invoke(*words) -> click.testing.Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def run(*words, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fkdpipe", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, folder, checkpoint):
    """A store and a run, made by the public commands."""
    place = tmp_path_factory.mktemp("cli")
    made = invoke(
        "generate", folder, place / "store", "--teacher", f"test_resnet={checkpoint}",
        "--form", "topk:3", "--crops", "4", "--source", "t",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    trained = invoke(
        "train", folder, place / "store", "--student", "test_resnet", "--size", "32",
        "--target", "marginal-smoothing:3", "--crops-per-image", "2", "--epochs", "2",
        "--batch-size", "16", "--lr", "0.05", "--out", place / "run", "--cache", place / "cache",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    return place


def test_help_is_instant():
    """Heavy packages are imported inside the commands; measured as the best of three starts."""
    best = min(_seconds([sys.executable, "-m", "fkdpipe", "--help"]) for _ in range(3))
    blank = min(_seconds([sys.executable, "-c", "pass"]) for _ in range(3))
    assert best - blank < 0.3
    code = "import sys; from fkdpipe import cli; print([m for m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not any(f"'{name}'" in loaded for name in ("torch", "zarr", "timm", "numpy", "rich"))


def _seconds(command) -> float:
    begun = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - begun


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_an_example_that_parses(name):
    shown = invoke(name, "--help").output
    options, _, example = shown.rpartition("Example:\n")
    assert "Options:\n" in options
    assert "  --help" in options or "-h, --help" in options
    words = shlex.split(example.replace("\\\n", " ").strip())
    assert words[:2] == ["fkdpipe", name]
    cli.commands[name].make_context(name, words[2:], resilient_parsing=False)


def test_the_help_of_all_ends_with_an_example_too():
    assert invoke("--help").output.endswith("  Example:\n    fkdpipe demo\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_version():
    assert invoke("--version").output.startswith("fkdpipe, version 0.")


def test_the_whole_way(pipeline, folder):
    assert (pipeline / "run" / "student.safetensors").is_file()
    made = invoke("evaluate", folder, pipeline / "run", "--json")
    figures = json.loads(made.stdout)
    assert {"top1", "top5", "images"} <= figures.keys()
    assert figures["images"] == 10
    held_out = invoke("evaluate", folder / "val", pipeline / "run", "--json")
    assert json.loads(held_out.stdout) == figures


def test_a_teacher_can_be_evaluated_before_days_are_spent(folder, checkpoint):
    made = invoke("evaluate", folder, f"test_resnet={checkpoint}")
    assert made.exit_code == 0, made.output
    assert "top-1" in made.stdout


def test_report_json_keeps_its_contract(pipeline):
    figures = json.loads(invoke("report", pipeline / "store", "--json").stdout)
    assert {
        "images", "crops_per_image", "classes", "form", "targets", "stored_bytes",
        "bytes_per_crop", "fields", "imagenet",
    } <= figures.keys()  # fmt: skip
    on_disk = sum(f.stat().st_size for f in (pipeline / "store").rglob("*") if f.is_file())
    assert figures["stored_bytes"] == on_disk
    assert sum(f["stored_bytes"] for f in figures["fields"].values()) == on_disk
    assert {"box", "flip", "ids", "prob"} <= figures["fields"].keys()
    assert figures["classes"] == 5


def test_report_text_names_the_papers_numbers(pipeline):
    text = invoke("report", pipeline / "store").stdout
    assert "5.30 GB" in text
    assert "hard, smoothing, marginal-smoothing (K<=3)" in text


def test_verify_exit_codes(pipeline, tmp_path):
    good = invoke("verify", pipeline / "store", "--full", "--json")
    assert good.exit_code == 0
    assert json.loads(good.stdout) == {"ok": True, "problems": []}
    broken = tmp_path / "store"
    shutil.copytree(pipeline / "store", broken)
    (broken / "rounds/0/labels/t/ids/c/0/0/0").unlink()
    bad = invoke("verify", broken, "--json")
    assert bad.exit_code == 1
    (problem,) = json.loads(bad.stdout)["problems"]
    assert (problem["code"], problem["unit"]) == ("missing-file", 0)


def test_flags_and_set_come_before_the_recipe(tmp_path, folder, pipeline):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'student = "test_resnet"\ntarget = "hard"\nsize = 32\nepochs = 3\nbatch_size = 16\n'
        "[optimizer]\nlr = 0.5\nweight_decay = 0.5\nmomentum = 0.5\n"
    )
    made = invoke(
        "train", folder, pipeline / "store", "--recipe", recipe,
        "--set", "optimizer.weight_decay=0.25", "--lr", "0.125", "--epochs", "1",
        "--out", tmp_path / "run", "--cache", tmp_path / "cache",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    found = settings["optimizer"]
    assert (found["lr"], found["weight_decay"], found["momentum"]) == (0.125, 0.25, 0.5)
    assert settings["epochs"] == 1


def test_every_problem_of_a_recipe_is_listed_at_once(tmp_path, folder):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'student = "test_resnet"\nepoch = 3\nbatch_size = "many"\n[optimizer]\nlearning_rate = 1\n'
    )
    made = invoke("train", folder, "--recipe", recipe, "--out", tmp_path / "run")
    assert made.exit_code == 2
    assert "3 problems" in made.stderr
    assert "epoch is not a setting; did you mean epochs?" in made.stderr
    assert "batch_size must be a whole number above 0; found 'many'" in made.stderr
    assert "optimizer.learning_rate is not a setting" in made.stderr


def mistakes(pipeline, folder, checkpoint, tmp_path):
    teacher = ["--teacher", f"test_resnet={checkpoint}"]
    generate = ["generate", folder, tmp_path / "new", *teacher]
    train = ["train", folder, pipeline / "store", "--student", "test_resnet", "--size", "32"]
    out = ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for name in CLASSES:
        (other / "train" / name).rename(other / "train" / f"{name} tree")
    small = tmp_path / "small.pth"
    import timm
    import torch

    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), small)
    return {
        "no folder": (1, "no such folder", ["generate", tmp_path / "x", tmp_path / "s", *teacher, "--crops", "2"]),
        "no crops": (2, "--crops M", [*generate, "--form", "hard"]),
        "no teacher": (2, "teacher is required: NAME or NAME=FILE", ["generate", folder, tmp_path / "s"]),
        "unknown form": (2, "is not a form", [*generate, "--form", "soft", "--crops", "2"]),
        "K above C": (2, "has 5 classes", [*generate, "--form", "topk:9", "--crops", "2"]),
        "no crops at all": (2, "crops must be a whole number above 0; found 0", [*generate, "--crops", "0"]),
        "part": (2, "I/N", [*generate, "--crops", "2", "--part", "3/2"]),
        "unknown teacher": (1, "Did you mean", ["generate", folder, tmp_path / "s", "--teacher", "resnet_18", "--crops", "2"]),
        "offline": (1, "resnet18=weights", ["generate", folder, tmp_path / "s", "--teacher", "resnet18", "--crops", "2"]),
        "does not fit": (1, "does not fit", ["generate", folder, tmp_path / "s", "--teacher", f"test_resnet={small}", "--crops", "2"]),
        "precision": (2, "precision must be one of", [*generate, "--precision", "int4", "--crops", "2"]),
        "device": (2, "0 CUDA devices", [*generate, "--crops", "2", "--device", "cuda"]),
        "unknown target": (2, "is not a target", [*train, "--target", "soft", *out]),
        "poor form": (1, "cannot serve", [*train, "--target", "full", *out]),
        "no store": (1, "is not a store", ["train", folder, tmp_path / "x", "--student", "test_resnet", "--target", "hard", *out]),
        "labels without a store": (2, "needs a store", ["train", folder, "--student", "test_resnet", "--target", "hard", *out]),
        "unknown student": (1, "Did you mean", ["train", folder, "--student", "resnet_18", *out]),
        "no student": (2, "student is required", ["train", folder, *out]),
        "other classes": (1, "was made from other images", ["train", other, *train[2:], "--target", "hard", *out]),
        "batch": (2, "not a multiple", [*train, "--target", "hard", "--crops-per-image", "3", "--batch-size", "16", *out]),
        "recipe": (2, "no such recipe", [*train, "--recipe", tmp_path / "none.toml", *out]),
        "set": (2, "KEY=VALUE", [*train, "--set", "epochs", *out]),
        "report": (1, "is not a store", ["report", folder]),
        "verify": (1, "is not a store", ["verify", folder]),
        "evaluate": (1, "Did you mean", ["evaluate", folder, "resnet_18"]),
        "no val": (1, "has class folders, but no val/ folder", ["evaluate", folder / "train", teacher[1], "--split", "val"]),
        "unfinished": (1, "is a folder without student", ["evaluate", folder, folder]),
        "no target": (2, "name the training target", [*train, *out]),
        "in the store": (2, "is inside the store", [*train, "--target", "hard", "--out", pipeline / "store" / "run"]),
        "twice": (2, "epochs is given twice", [*train, "--epochs", "2", "--set", "epochs=1", *out]),
        "hub": (1, "could not be fetched", ["transfer", "resnet18", folder]),
    }  # fmt: skip


NAMES = [
    "no folder", "no crops", "no teacher", "unknown form", "K above C", "no crops at all", "part",
    "unknown teacher", "offline", "does not fit", "precision", "device", "unknown target",
    "poor form", "no store", "labels without a store", "unknown student", "no student",
    "other classes", "batch", "recipe", "set", "report", "verify", "evaluate", "no val",
    "unfinished", "no target", "in the store", "twice", "hub",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_gives_one_clear_line_and_its_exit_code(
    name, pipeline, folder, checkpoint, tmp_path
):
    if name == "device":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device here")
    code, words, command = mistakes(pipeline, folder, checkpoint, tmp_path)[name]
    made = invoke(*command)
    assert made.exit_code == code, made.output
    assert words in made.stderr
    assert [x for x in made.stderr.splitlines() if x.startswith("Error:")]
    assert made.stderr.count("\nError:") + made.stderr.startswith("Error:") == 1
    assert "Traceback" not in made.output
    assert not made.stdout


def test_the_table_of_mistakes_is_complete(pipeline, folder, checkpoint, tmp_path):
    assert sorted(mistakes(pipeline, folder, checkpoint, tmp_path)) == sorted(NAMES)


def test_a_signal_ends_generation_with_a_message_and_keeps_what_is_committed(
    tmp_path, folder, checkpoint
):
    command = [
        sys.executable, "-m", "fkdpipe", "generate", folder, tmp_path / "store",
        "--teacher", f"test_resnet={checkpoint}", "--form", "hard", "--crops", "400",
    ]  # fmt: skip
    process = subprocess.Popen(
        [str(word) for word in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / "store" / "rounds/0/crops/box/c/0/0/0").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted: 0 of 1 unit committed and kept" in stderr
    assert "Traceback" not in stderr


def test_an_interrupted_command_without_units_says_that_nothing_new_is_kept(pipeline, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fkdpipe.inspect.report.measure", interrupted)
    outcome = invoke("report", pipeline / "store")
    assert outcome.exit_code == 1
    assert "interrupted: nothing new is finished; earlier work is kept." in outcome.stderr


def test_an_interrupted_transfer_keeps_trials_only_in_a_named_folder(
    pipeline, folder, tmp_path, monkeypatch
):
    def stopped(*arguments, **options):
        raise TrainingError("stopped at step 2", code="stopped")

    monkeypatch.setattr("fkdpipe.downstream.transfer.transfer", stopped)
    words = ("transfer", pipeline / "run", folder)
    assert "interrupted: without --out, no trial is kept." in invoke(*words).stderr
    assert "stopped at step 2" in invoke(*words, "--out", tmp_path / "trials").stderr


def test_what_an_earlier_run_did_is_no_part_of_rate_and_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    with bars.Lines().task("train", 1000, "steps", done=900) as advance:
        for _ in range(2):
            now[0] += 20
            advance(20)
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "train: 920/1,000 steps, 1 steps/s, 0:01:20 left"
    assert second == "train: 940/1,000 steps, 1 steps/s, 0:01:00 left"
    assert last == "train: 940/1,000 steps in 0:00:40"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_cannot_print_an_arrow_gets_a_question_mark(pipeline, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "fkdpipe", "analyse", str(pipeline / "store")]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert ("→" if encoding == "utf-8" else "?") in done.stdout.decode(encoding)


def test_python_dash_m_works():
    made = run("--help", env={**os.environ})
    assert made.returncode == 0
    assert "Commands:" in made.stdout


def test_everything_wrong_with_a_command_is_said_at_once(tmp_path, folder):
    words = "epochs=0 window=0 seed=-1 fraction=2.0 ema=3.0 optimizer.lr=-1.0 method.weight=1"
    given = [part for word in words.split() for part in ("--set", word)]
    made = invoke("train", folder, "--student", "test_resnet", *given, "--out", tmp_path / "run")
    assert made.exit_code == 2
    assert "7 problems" in made.stderr
    for word in words.split():
        assert f"\n  {word.partition('=')[0]} " in made.stderr
    assert "method.weight is not a setting; did you mean method.soft_weight?" in made.stderr


def test_a_commands_settings_are_shown_without_its_arguments(tmp_path):
    (tmp_path / "r.toml").write_text("epochs = 7\n[method]\nname = 'srd'\n")
    given = ["--recipe", tmp_path / "r.toml", "--batch-size", "64", "--set", "crop.scale=[0.5,1]"]
    made = invoke("train", "--show-settings", *given)
    assert made.exit_code == 0, made.output
    assert max(map(len, made.stdout.splitlines())) <= 80
    assert re.search(r"epochs +7 +Number of epochs", made.stdout)
    assert re.search(r"method.alpha +4 ", made.stdout)
    made = invoke("train", "--show-settings", "--json", *given)
    shown = {each["name"]: each for each in json.loads(made.stdout)["settings"]}
    assert (shown["epochs"]["value"], shown["epochs"]["default"]) == (7, 100)
    assert shown["crop.scale"]["value"] == [0.5, 1]
    assert shown["student"]["required"]
    assert shown["method.name"]["value"] == "srd"
    assert "soft_weight" not in shown
    wrong = invoke("train", "--show-settings", "--set", "epochs=0")
    assert wrong.exit_code == 2
    assert "epochs must be" in wrong.stderr
    assert "Missing argument 'DATA'" in invoke("train").stderr  # as before


@pytest.mark.parametrize("command", ["generate", "fit-basis", "transfer"])
def test_other_commands_show_their_settings_too(command):
    made = invoke(command, "--show-settings", "--json")
    shown = {each["name"]: each for each in json.loads(made.stdout)["settings"]}
    assert {"batch_size", "crop.jitter.hue", "precision"} <= shown.keys()
    assert all(each["meaning"] for each in shown.values())
