"""Rerun the teacher: a random sample, near ties count as equal, damage is reported as a problem."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import load_teacher
from pipeline import CPU, make_store

from fkdpipe.cli import cli
from fkdpipe.labelgen import check
from fkdpipe.storage import labels


@pytest.fixture(scope="module")
def store(tmp_path_factory, folder, teacher):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 8)
        patch.setattr("fkdpipe.storage.schema.CHUNK_IMAGES", 8)
        patch.setattr("fkdpipe.storage.writer.schema.GROUP_CROPS", 2)
        return make_store(
            tmp_path_factory.mktemp("check") / "store", folder, [teacher], form="full"
        )


def test_the_sample_is_as_large_as_asked_for_and_lies_anywhere(store, folder, teacher, monkeypatch):
    part = store.part("rounds/0/labels/t")
    seen = [(u, r, c) for u, rows, crops in check._positions(store, part, 100) for r, c in
            zip(rows.tolist(), crops.tolist(), strict=True)]  # fmt: skip
    assert len(set(seen)) == 100
    assert {unit for unit, _, _ in seen} == set(range(store.num_units))
    assert {crop for _, _, crop in seen} == {0, 1, 2, 3}
    assert all(row // store.unit_size == unit for unit, row, _ in seen)
    read = []
    plain = type(store).read_checked
    monkeypatch.setattr(
        type(store),
        "read_checked",
        lambda self, key, *a: (read.append(key), plain(self, key, *a))[1],
    )
    checked = check.teacher(store, part, folder, [teacher], device=CPU, sample=3)
    assert checked.crops == 3
    assert not checked.problems
    assert len([key for key in read if "/log_prob/" in key]) <= 3


@pytest.mark.parametrize("form", ["hard", "topk:1", "topk:3"])
def test_a_near_tie_that_fell_the_other_way_is_no_difference(tmp_path, folder, checkpoint, form):
    pair = [load_teacher(checkpoint), load_teacher(checkpoint)]
    for one, side in zip(pair, (1e-5, -1e-5), strict=True):
        head = one.module.network.get_classifier()
        with torch.no_grad():
            head.weight[1:3] = head.weight[0]
            head.bias[0] += 2.0  # first, second and third choice, all but equal
            head.bias[1], head.bias[2] = head.bias[0] + side, head.bias[0] - side
    store = make_store(tmp_path / "store", folder, pair[:1], form=form)
    part = store.part("rounds/0/labels/t")
    again = check.teacher(store, part, folder, pair[1:], device=CPU, sample=100)
    assert again.crops == 100
    assert not again.problems


def test_kept_classes_are_compared_with_those_that_should_have_been_kept():
    prob = np.array([[0.5, 0.3, 0.2, 0.0]], dtype=np.float32)
    hard = labels.parse_form("hard")
    for kept, lacking in [(0, 0.0), (1, 0.2), (2, 0.3), (9, 1.0)]:
        ids = np.array([[kept]], dtype=np.uint16)
        assert check.label_difference(hard, {"ids": ids}, prob) == pytest.approx(lacking)
    two = labels.parse_form("topk:2")
    stored = {"ids": np.array([[0, 2]], np.uint16), "prob": np.array([[0.5, 0.2]], np.float16)}
    assert check.label_difference(two, stored, prob) == pytest.approx(0.1, abs=1e-3)
    stored["prob"] = np.array([[0.5, 0.4]], np.float16)  # the other two share what is left
    assert check.label_difference(two, stored, prob) == pytest.approx(0.2, abs=1e-3)


def verify(*words) -> tuple[int, list[dict]]:
    made = CliRunner().invoke(cli, ["verify", *map(str, words), "--json"])
    assert made.stdout, made.stderr
    return made.exit_code, json.loads(made.stdout)["problems"]


def test_damage_met_by_the_teacher_stands_in_the_list_of_problems(
    tmp_path, store, folder, checkpoint
):
    shutil.copytree(store.url, tmp_path / "store")
    shard = tmp_path / "store/rounds/0/labels/t/log_prob/c/1/0/0"
    data = shard.read_bytes()
    shard.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    again = ("--data", folder, "--teacher", f"test_resnet={checkpoint}", "--sample", 100)
    code, problems = verify(tmp_path / "store", *again)
    assert code == 1
    assert [(p["code"], p["unit"]) for p in problems] == [("checksum", 1)]
    (tmp_path / "store/images/key/c/0").unlink()
    code, problems = verify(tmp_path / "store", *again)
    assert code == 1
    assert {p["code"] for p in problems} == {"missing-file", "no-record"}


def test_only_what_the_teacher_made_is_compared(tmp_path, store, folder, checkpoint):
    shutil.copytree(store.url, tmp_path / "store")
    other = load_teacher(checkpoint)
    with torch.no_grad():
        other.module.network.get_classifier().weight.mul_(0.5)
    other = type(other)(**{**vars(other), "digest": "0" * 64})
    both = make_store(tmp_path / "store", folder, [other], source="a", form="hard")
    assert both.sources() == ["a", "t"]
    again = ("--data", folder, "--teacher", f"test_resnet={checkpoint}", "--sample", 8)
    assert verify(tmp_path / "store", *again) == (0, [])
    code, problems = verify(tmp_path / "store", *again, "--source", "a")
    assert code == 1
    assert [p["code"] for p in problems] == ["teacher-differs"]
    assert "teachers.0.weights" in problems[0]["detail"]
