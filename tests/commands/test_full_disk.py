"""A disk that is full or refuses: one line that names the file and the reason, no traceback."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from click.testing import CliRunner
from pipeline import make_store
from safetensors.torch import save_file

from fkdpipe.cli import cli
from fkdpipe.common import disk, errors
from fkdpipe.interchange import exporting
from fkdpipe.train import checkpoint

NOWHERE = "/proc/fkdpipe"  # where nobody, root included, can make a folder
TRAIN = ["train", "IMAGES", "--student", "test_resnet", "--target", "ground-truth"]
COMMANDS = [
    [*TRAIN, "--size", "32", "--epochs", "1", "--out", NOWHERE],
    ["export", "fkd", "STORE", NOWHERE],
    ["export", "parquet", "STORE", NOWHERE],
    ["demo", "--out", NOWHERE],
    ["transfer", "test_resnet=TEACHER", "IMAGES", "--epochs", "1", "--out", NOWHERE],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[:2]))
def test_a_place_that_cannot_be_made_is_said(command, folder, checkpoint, teacher, tmp_path):
    if "STORE" in command:
        make_store(tmp_path / "store", folder, [teacher])
    places = {"IMAGES": folder, "STORE": tmp_path / "store", "TEACHER": checkpoint}
    for name, place in places.items():
        command = [word.replace(name, str(place)) for word in command]
    made = CliRunner().invoke(cli, command)
    assert made.exit_code == 1, made.output
    assert isinstance(made.exception, SystemExit)
    assert f"Error: {NOWHERE}" in made.stderr
    assert "No such file or directory" in made.stderr


def test_a_full_disk_is_said_where_no_file_is_named(monkeypatch, folder, teacher, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_store(tmp_path / "store", folder, [teacher])
    monkeypatch.setattr(torch, "save", full)
    out = tmp_path / "labels"
    made = CliRunner().invoke(cli, ["export", "fkd", str(tmp_path / "store"), str(out)])
    assert made.exit_code == 1
    assert f"Error: {out}" in made.stderr
    assert "the disk is full. Free some space" in made.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no device that is always full")
def test_torch_hides_the_reason_of_a_failed_write_and_it_is_found():
    with pytest.raises(OSError, match="No space left") as caught:
        exporting.save_torch([torch.zeros(1_000_000)], "/dev/full")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


def test_safetensors_prints_the_reason_of_a_failed_write_and_it_is_found():
    with pytest.raises(OSError) as caught, disk.writing("x"):
        save_file({"a": torch.zeros(1)}, "/proc/fkdpipe/x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "x")


def test_a_failed_checkpoint_leaves_the_earlier_one(monkeypatch, tmp_path):
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=1)

    def full(content, file):
        file.write(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError) as caught:
        checkpoint.save(tmp_path, 2, {"step": 2}, keep=1)
    assert caught.value.filename == str(tmp_path / "step-000000002.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["step-000000001.pt"]
    assert checkpoint.load_latest(tmp_path) == {"step": 1}


def test_an_error_of_ours_with_an_os_error_behind_it_stays_ours():
    def read():
        with disk.writing("x"):
            try:
                raise OSError(errno.ENOENT, "gone")
            except OSError:
                raise errors.StoreError("no store") from None

    with pytest.raises(errors.StoreError):
        read()
