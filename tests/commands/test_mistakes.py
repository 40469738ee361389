"""Mistakes on the command line that once ended in a traceback, or went through unseen."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from fkdpipe.cli import cli
from fkdpipe.pixels import images

NAN_RATE = ["plan", "--teacher-throughput"]
GENERATE = ["generate", "IMAGES", "PLACE/store", "--teacher", "TEACHER", "--crops", "2"]
TRAIN = ["train", "IMAGES", "--student", "test_resnet"]
FIT = ["fit-basis", "IMAGES", "PLACE/b.st", "--teacher", "TEACHER"]
RUN = ["--out", "PLACE/run"]
MISTAKES = [
    (2, "--batch-size", ["evaluate", "IMAGES", "TEACHER", "--batch-size", "0"]),
    (2, "--batch-size", ["evaluate", "IMAGES", "TEACHER", "--batch-size", "-4"]),
    (2, "is a file", ["demo", "--out", "PLACE/file"]),
    (2, "is a file", [*TRAIN, "--out", "PLACE/file"]),
    (2, "is a file", [*TRAIN, "--out", "PLACE/file/run"]),
    (2, "inside the image folder", [*TRAIN, "--out", "IMAGES"]),
    (2, "inside the image folder", [*TRAIN, "--out", "IMAGES/train/run"]),
    (2, "seed must be", [*TRAIN, *RUN, "--seed", "-1"]),
    (2, "optimizer.lr must be a finite number", [*TRAIN, *RUN, "--lr", "nan"]),
    (2, "optimizer.lr must be a finite number", [*TRAIN, *RUN, "--lr", "inf"]),
    (2, "threads must be a whole number above 0", [*TRAIN, *RUN, "--set", "threads=0"]),
    (2, "threads must be a whole number above 0", [*GENERATE, "--set", "threads=0"]),
    (2, "threads must be a whole number above 0", [*FIT, "--set", "threads=0"]),
    (2, "must be auto, cpu, cuda", [*GENERATE, "--device", "meta"]),
    (2, "teacher_weight", [*GENERATE, "--teacher-weight", "nan"]),
    (2, "a file in an existing folder", ["fit-basis", "IMAGES", "PLACE/none/b.st", *FIT[3:]]),
    (2, "a file in an existing folder", ["fit-basis", "IMAGES", "PLACE", *FIT[3:]]),
    (2, "does not exist", [*FIT, "--plot", "PLACE/none/b.png"]),
    (2, "not a finite number", [*NAN_RATE, "nan"]),
    (2, "not a finite number", ["plan", "--train-throughput", "inf"]),
    (2, "--sample", ["verify", "PLACE/store", "--sample", "0"]),
    (2, "--sample", ["verify", "PLACE/store", "--sample", "-1"]),
    (2, "can only be used with --model", ["analyse", "PLACE/store", "PLACE/nope"]),
    (2, "can only be used with --model", ["analyse", "PLACE/store", "--class-map", "PLACE/nope"]),
    (1, "it has resnet18.a1_in1k", [*GENERATE[:3], "--teacher", "resnet18.nosuch", "--crops", "2"]),
]


@pytest.mark.parametrize(("code", "words", "command"), MISTAKES, ids=str)
def test_a_mistake_is_refused_at_once(code, words, command, folder, checkpoint, tmp_path):
    (tmp_path / "file").touch()
    before = images.scan(folder).fingerprint
    places = {"IMAGES": folder, "PLACE": tmp_path, "TEACHER": f"test_resnet={checkpoint}"}
    for name, place in places.items():
        command = [word.replace(name, str(place)) for word in command]
    made = CliRunner().invoke(cli, command)
    assert made.exit_code == code, made.output
    assert words in made.stderr
    assert not isinstance(made.exception, (TypeError, OSError, OverflowError))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    assert images.scan(folder).fingerprint == before


def test_folders_without_labels_say_what_is_missing(folder, tmp_path):
    words = ["import", "sre2l", str(tmp_path), str(folder), str(tmp_path / "store")]
    made = CliRunner().invoke(cli, words)
    assert made.exit_code == 1, made.output
    assert "has no folder epoch_<E>" in made.stderr
