"""Runs of several processes, and runs that are stopped or killed and go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline import command_line, losses, make_store, prepare_run, train, train_settings
from safetensors.torch import load_file

from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import TrainingError
from fkdpipe.train import checkpoint, exclusive, loop, metrics, parallel, state

PYTHON = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def store(tmp_path_factory, folder, teacher):
    return make_store(tmp_path_factory.mktemp("stores") / "store", folder, [teacher])


def command(folder: Path, store, out: Path, *more: str) -> list[str]:
    return [
        "train", str(folder), store.url, "--student", "test_vit", "--size", "32",
        "--target", "marginal-smoothing:3", "--crops-per-image", "2", "--epochs", "4",
        "--batch-size", "16", "--lr", "0.02", "--device", "cpu", "--out", str(out),
        "--set", "threads=1", "--set", "log_every=1", *more,
    ]  # fmt: skip


def test_two_processes_train_as_one(tmp_path, folder, store):
    more = ("--set", "mixing.mixup=0.8", "--set", "mixing.block=2", "--set", "accumulate=2")
    environment = {**os.environ, **PYTHON}
    one = [sys.executable, "-m", "fkdpipe", *command(folder, store, tmp_path / "one", *more)]
    two = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "fkdpipe", *command(folder, store, tmp_path / "two", *more),
    ]  # fmt: skip
    for line in (one, two):
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    read = metrics.read
    (a, b) = (
        [x for x in read(tmp_path / n / "metrics.jsonl") if x["kind"] == "eval"][-1]
        for n in ("one", "two")
    )
    assert (a["images"], a["skipped"]) == (b["images"], b["skipped"]) == (10, 0)
    one, two = (load_file(tmp_path / n / "student.safetensors") for n in ("one", "two"))
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-4


def wait_for(what, process) -> None:
    until = time.monotonic() + 600  # a busy machine may take minutes to import torch
    while not what():
        assert process.poll() is None, "it ended before"
        if time.monotonic() > until:
            process.kill()
            process.communicate()
            pytest.fail("it never came so far")
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path, folder, store, number):
    environment = {**os.environ, **PYTHON}
    long = ("--epochs", "400", "--set", "eval_every=400")
    line = [sys.executable, "-m", "fkdpipe", *command(folder, store, tmp_path / "run", *long)]
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    file = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: file.exists() and len(file.read_text().splitlines()) > 7, process)
    process.send_signal(number)
    _, text = process.communicate()
    assert process.returncode == 1
    assert "a checkpoint is written" in text
    newest = checkpoint.list_all(tmp_path / "run" / state.CHECKPOINTS)[-1]
    held = torch.load(newest, weights_only=True)["step"]
    assert held == metrics.read(file)[-1]["step"]


def test_a_second_ctrl_c_ends_at_once_and_says_which_step_is_kept(
    tmp_path, folder, store, monkeypatch
):
    """The first is passed on twice within a moment, as by torchrun, and counts once."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    plain, steps = loop.step, []
    before = signal.getsignal(signal.SIGINT)  # ignored in what a script started in the background

    def interrupted(run, batch):
        steps.append(run.step)
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            now[0] += 2
            os.kill(os.getpid(), signal.SIGINT)
        return plain(run, batch)

    monkeypatch.setattr(loop, "step", interrupted)
    words = "at step 5 of [0-9]+; the checkpoint of step 4 is kept"
    with pytest.raises(KeyboardInterrupt, match=words):
        train(tmp_path / "run", folder, store, epochs=40, checkpoint_every=2)
    assert steps == [0, 1, 2, 3, 4, 5]
    assert checkpoint.newest_step(tmp_path / "run" / state.CHECKPOINTS) == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_run_into_the_same_folder_is_refused_until_the_first_is_killed(
    tmp_path, folder, store
):
    environment = {**os.environ, **PYTHON}
    words = command(folder, store, tmp_path / "run", "--epochs", "4000")
    line = [sys.executable, "-m", "fkdpipe", *words]
    process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
    file = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: file.exists() and len(file.read_text().splitlines()) > 3, process)
    before = (tmp_path / "run" / "settings.json").stat().st_mtime_ns
    refused = f"being written by process {process.pid} on .*name another --out folder"
    with pytest.raises(TrainingError, match=refused):
        train(tmp_path / "run", folder, store)
    assert (tmp_path / "run" / "settings.json").stat().st_mtime_ns == before
    process.kill()
    process.wait()
    with exclusive.hold(tmp_path / "run"):
        prepared = prepare_run(tmp_path / "other", folder, store, train_settings())
        prepared.out = tmp_path / "run"
        with pytest.raises(TrainingError, match=f"process {os.getpid()} on"):
            loop.train(prepared)
    exclusive.check(tmp_path / "run")


def test_an_interrupt_before_the_first_checkpoint_keeps_nothing(
    tmp_path, folder, store, monkeypatch
):
    def interrupted(run, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"at step 0 of [0-9]+; there is no checkpoint"):
        train(tmp_path / "run", folder, store)


def test_sigterm_cuts_an_evaluation_short_and_the_run_goes_on_with_it(
    tmp_path, folder, store, monkeypatch
):
    settings = {"epochs": 4, "eval_every": 2}
    train(tmp_path / "whole", folder, store, **settings)
    plain, seen = loop.accuracy, []

    def terminated(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        made = plain(*arguments, **options, batch_size=4)
        seen.append(made.images)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accuracy", terminated)
        with pytest.raises(TrainingError, match="a checkpoint is written"):
            train(tmp_path / "run", folder, store, **settings)
    assert seen == [4]  # of ten
    train(tmp_path / "run", folder, store, **settings)
    whole, run = (
        [x for x in metrics.read(tmp_path / name / "metrics.jsonl") if x["kind"] == "eval"]
        for name in ("whole", "run")
    )
    assert run == whole
    assert len(run) == 2


@pytest.mark.parametrize(("step_seconds", "apart"), [(3.0, 1), (0.125, 16), (0.001, 100)])
def test_processes_ask_each_other_about_stopping_every_two_seconds(
    monkeypatch, step_seconds, apart
):
    """A second process takes three times as long for a step; both learn the same sums."""
    now, asked_at = [0.0], []

    def total(values, rank, device):
        asked_at.append(step)
        return torch.tensor([float(step > 250), values[1] + 3 * values[1]])

    monkeypatch.setattr(loop.parallel, "total", total)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    stop = loop._Stop()
    for step in range(1, 1000):
        now[0] += step_seconds / 2  # on average over the two: step_seconds
        if stop.now(SimpleNamespace(step=step, rank=Rank(0, 2), device=None)):
            break
    assert set(np.diff(asked_at).tolist()) == {apart}
    assert step in range(251, 251 + apart)


@pytest.mark.parametrize(
    ("rank", "order"),
    [
        (Rank(0, 4, 0), ["work", "meet"]),
        (Rank(2, 4, 0), ["work", "meet"]),  # of the second machine
        (Rank(3, 4, 1), ["meet", "work"]),
    ],
)
def test_the_first_process_of_a_machine_copies_its_labels_and_reports(monkeypatch, rank, order):
    seen = []
    monkeypatch.setattr(parallel, "total", lambda *arguments: seen.append("meet"))
    with parallel.local_first(rank, torch.device("cpu")):
        seen.append("work")
    assert seen == order


@pytest.mark.slow
def test_sigterm_stops_several_processes_at_the_same_step(tmp_path, folder, store):
    long = ("--epochs", "4000", "--set", "eval_every=4000")
    line = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "fkdpipe", *command(folder, store, tmp_path / "run", *long),
    ]  # fmt: skip
    environment = {**os.environ, **PYTHON}
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    file = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: file.exists() and len(file.read_text().splitlines()) > 7, process)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate()
    assert "a checkpoint is written" in text
    newest = checkpoint.list_all(tmp_path / "run" / state.CHECKPOINTS)[-1]
    assert torch.load(newest, weights_only=True)["step"] == metrics.read(file)[-1]["step"]


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_same_weights(
    tmp_path, folder, store, monkeypatch
):
    """kill -9 ten times, spread over the run: bit-identical on the CPU. The processes are forked
    from a server that has torch already."""
    for name, value in PYTHON.items():
        monkeypatch.setenv(name, value)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fkdpipe.train.run", "fkdpipe.train.loop"])
    more = ("--set", "checkpoint_every=3", "--epochs", "40", "--set", "eval_every=40")
    words = command(folder, store, tmp_path / "run", *more, "--cache", str(tmp_path / "cache"))
    file = tmp_path / "run" / "metrics.jsonl"
    random = np.random.default_rng(0)
    steps, killed_at = 128, []
    for target in np.sort(random.choice(np.arange(1, steps - 20), 10, replace=False)).tolist():
        before = last_step(file)
        process = processes.Process(target=command_line, args=(words,))
        process.start()
        while process.is_alive() and (last_step(file) == before or last_step(file) < target):
            process.join(0.03)
        process.join(float(random.uniform(0, 0.1)))
        process.kill()
        process.join()
        killed_at.append(last_step(file))
    assert min(killed_at) < steps / 4
    assert max(killed_at) > steps / 2
    for name in ("run", "whole"):
        words[words.index("--out") + 1] = str(tmp_path / name)
        process = processes.Process(target=command_line, args=(words,))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert len(losses(tmp_path / "run")) == steps
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    a, b = (load_file(tmp_path / name / "student.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in b)


def last_step(file: Path) -> int:
    lines = metrics.read(file) if file.exists() else []
    return lines[-1]["step"] if lines else 0
