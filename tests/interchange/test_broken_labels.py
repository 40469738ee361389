"""Label files that are cut off, of another shape or hostile: an image is left out, or a message.

Nothing that a file holds is run, and no file of a user ends in a traceback.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import foreign
import numpy as np
import pipeline
import pytest
import torch
from click.testing import CliRunner
from exchange import bring
from test_round_trips import SETTINGS, write

from fkdpipe.cli import cli
from fkdpipe.common.errors import LabelsError
from fkdpipe.interchange import IMPORTS
from fkdpipe.pixels import images
from fkdpipe.storage.store import open_store

FILES = {"fkd": "*.tar", "ml-dr": "[0-9]*.tar", "relabel": "*.pt", "tokenlabeling": "*.pt",
         "sre2l": "epoch_1/*1.tar", "tinyvit": "*values.bin"}  # fmt: skip


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def hostile(file: Path, kind: str, mark: Path) -> None:
    if kind == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind == "torch":
        torch.save(Hostile(mark), file)
    else:
        torch.save([torch.tensor(1.0)] * 3, file)


@pytest.mark.parametrize("kind", ["cut", "torch", "numbers"])
@pytest.mark.parametrize("format_", IMPORTS)
def test_a_hostile_file_is_left_out_and_runs_nothing(tmp_path, few, format_, kind):
    place = tmp_path / "files"
    write(format_, place, few)
    file = sorted(place.rglob(FILES[format_]))[1 if format_ != "sre2l" else 0]
    hostile(file, kind, tmp_path / "mark")
    if format_ == "tinyvit":  # one file for all images: nothing of it can be placed
        with pytest.raises(LabelsError, match="bytes"):
            bring(format_, place, few, tmp_path / "store", **SETTINGS[format_])
    else:
        made = bring(format_, place, few, tmp_path / "store", **SETTINGS[format_])
        assert made.failed.total() == (6 if format_ == "sre2l" else 1)
        assert set(made.failed) <= {"broken-label", "unsafe-label"}
        assert all(example.split(", ", 1)[1] for example in made.examples)
    assert not (tmp_path / "mark").exists()


ODD = {
    "numbers for arrays": [torch.tensor(1.0), torch.tensor(True), torch.tensor(2.0)],
    "no crops": [torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool), torch.zeros(0, 2, 3)],
    "flips of two axes": [torch.rand(2, 4), torch.zeros(2, 2) > 0, torch.rand(2, 2, 3)],
}


@pytest.mark.parametrize("kind", ODD)
def test_fkd_files_of_another_shape(tmp_path, few, kind):
    write("fkd", tmp_path / "labels", few)
    files = sorted((tmp_path / "labels").rglob("*.tar"))
    torch.save(ODD[kind], files[3])
    made = bring("fkd", tmp_path / "labels", few, tmp_path / "store", classes=1000)
    assert made.failed == {"broken-label": 1}
    for file in files:
        torch.save(ODD[kind], file)
    with pytest.raises(LabelsError, match="none of 20 label files could be read"):
        bring("fkd", tmp_path / "labels", few, tmp_path / "other", classes=1000)


@pytest.mark.parametrize("prob", [(1, 2), (), ([0.5], [1], [2]), ([], []), None])
def test_mldr_samples_of_another_shape(tmp_path, few, prob):
    write("ml-dr", tmp_path / "labels", few)
    samples = [{"params": [(0, 0, 4, 4), False], "prob": prob}] * 3
    torch.save((2, samples), tmp_path / "labels" / "2.pth.tar")
    made = bring("ml-dr", tmp_path / "labels", few, tmp_path / "store")
    assert made.failed == {"broken-label": 1}
    for index in range(20):
        torch.save((index, samples), tmp_path / "labels" / f"{index}.pth.tar")
    with pytest.raises(LabelsError, match=r"no label file could be read; for example \d+\S+: \w"):
        bring("ml-dr", tmp_path / "labels", few, tmp_path / "other")


@pytest.mark.parametrize("crop", [True, {"enable": True, "scale": 3}, "yes"])
def test_mldr_configurations_of_another_shape(tmp_path, few, crop):
    write("ml-dr", tmp_path / "labels", few)
    named = {"random_resized_crop": crop, "random_horizontal_flip": {"enable": True}}
    config = {"num_classes": 1000, "reinforce": {"image_augmentation": named}}
    torch.save(config, tmp_path / "labels" / "config.pth.tar")
    with pytest.raises(LabelsError, match="not in ml-dr's format"):
        bring("ml-dr", tmp_path / "labels", few, tmp_path / "store")


def test_tinyvit_records_of_no_image_are_counted_and_named(tmp_path, few):
    write("tinyvit", tmp_path / "labels", few)
    for file in (tmp_path / "labels").rglob("rank0-keys.txt"):
        keys = file.read_text().splitlines()
        file.write_text("".join(f"{k}\n" for k in ["9" * 25, "777", *keys[2:]]))
    made = bring("tinyvit", tmp_path / "labels", few, tmp_path / "store", **SETTINGS["tinyvit"])
    assert made.failed["no-label"] >= 2
    (note,) = made.notes
    assert note.startswith("6 labels belong to no image: ")
    assert "777" in note
    assert "9" * 25 in note


@pytest.mark.parametrize("batch", [3, 5])
@pytest.mark.parametrize("change", [-1, 1])
def test_sre2l_refuses_a_folder_of_one_image_more_or_less(tmp_path, few, cut, batch, change):
    truth = foreign.make_truth(images.scan(few), crops=2, k=1, classes=7)
    for entry in truth.values():
        entry["logits"] = np.zeros((2, 7), dtype=np.float16)
    order = foreign.imagefolder_keys(few / "train")
    place = foreign.write_sre2l(tmp_path / "labels", truth, order, batch=batch)
    assert bring("sre2l", place, few, tmp_path / "store").failed.total() == 0
    other = shutil.copytree(few, tmp_path / "other")
    if change < 0:
        (other / "train" / order[-1]).unlink()
    else:
        cut(1, 50, 50).save(other / "train" / "c" / "one more.jpg")
    with pytest.raises(LabelsError) as caught:
        bring("sre2l", place, other, tmp_path / "wrong")
    assert caught.value.code == "wrong-folder"


def test_sre2l_batches_of_another_size_are_left_out(tmp_path, few):
    write("sre2l", tmp_path / "labels", few)
    file = tmp_path / "labels" / "epoch_0" / "batch_1.tar"
    state = torch.load(file)
    torch.save([v if v is None else v[:5] for v in state], file)
    made = bring("sre2l", tmp_path / "labels", few, tmp_path / "store")
    assert made.failed == {"broken-label": 6}
    torch.save([*state[:5], state[5][:, :4]], file)
    assert bring("sre2l", tmp_path / "labels", few, tmp_path / "s2").failed == {"broken-label": 6}


def invoke(*words) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["import", *map(str, words)])
    return done.exit_code, done.output


def test_zero_is_a_setting_like_any_other(tmp_path, few):
    truth = foreign.make_truth(images.scan(few), crops=2, k=1, classes=7)
    for number, entry in enumerate(truth.values()):
        entry["logits"] = np.full((2, 7), number, dtype=np.float16)
    order = foreign.imagefolder_keys(few / "train")
    place = foreign.write_sre2l(tmp_path / "sre2l", truth, order, batch=6, seed=0)
    code, said = invoke("sre2l", place, few, tmp_path / "store", "--sampler-seed", 0)
    assert code == 0, said
    store = open_store(tmp_path / "store")
    largest = pipeline.arrays_of(store)["rounds/0/labels/sre2l/logit_max"][:, 0]
    assert largest.tolist() == [truth[str(key)]["logits"][0, 0] for key in store.images.keys]
    foreign.write_fkd(tmp_path / "fkd", truth)
    for option in ("--classes", "--crops", "--temperature", "--threads"):
        code, said = invoke("fkd", tmp_path / "fkd", few, tmp_path / "other", option, 0)
        assert (code, option.strip("-") in said) == (2, True), said
    code, said = invoke("relabel", tmp_path, few, tmp_path / "other", "--crops", 1, "--keep", 0)
    assert (code, "keep" in said) == (2, True), said
    code, said = invoke("sre2l", place, few, tmp_path / "other", "--sampler-seed", -1)
    assert (code, "sampler_seed" in said) == (2, True), said
