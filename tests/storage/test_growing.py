"""A store grows by rounds, sources and features, without touching what exists."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import CLASSES, load_teacher
from pipeline import CPU, arrays_of, make_store, prepare_run, stamps, train_settings, unchanged

from fkdpipe.cli import cli
from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import FkdpipeError, StoreMismatchError, TrainingError, UsageError
from fkdpipe.inspect import report
from fkdpipe.labelgen import check, dry_run, generate
from fkdpipe.labelgen import unit as making
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks.feature_layers import Needs
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import features, labels, reader, schema, verify
from fkdpipe.storage.store import open_store


def test_more_crops_are_a_new_round_and_the_same_crops_as_in_one(tmp_path, folder, teacher):
    store = make_store(tmp_path / "grown", folder, [teacher], crops=4)
    before = stamps(store)
    store = make_store(tmp_path / "grown", folder, [teacher], crops=7)
    assert unchanged(before, store)
    assert [p.settings.crops for p in store.rounds()] == [4, 3]
    at_once = make_store(tmp_path / "once", folder, [teacher], crops=7)
    a, b = arrays_of(store), arrays_of(at_once)
    for name in ("crops/box", "crops/flip"):
        joined = np.concatenate([a[f"rounds/0/{name}"], a[f"rounds/1/{name}"]], axis=1)
        assert np.array_equal(joined, b[f"rounds/0/{name}"])
    assert not verify.verify(store, full=True)
    run = prepare_run(tmp_path / "run", folder, store, train_settings(epochs=7, crops_per_image=1))
    crops: dict[int, list[int]] = {}
    for batch in run.crops.stream():
        for row, crop in zip(batch.rows.tolist(), batch.crops.tolist(), strict=True):
            crops.setdefault(row, []).append(crop)
    assert all(drawn == list(range(7)) for drawn in crops.values())


def test_a_second_teacher_lies_beside_the_first(tmp_path, folder, teacher, checkpoint):
    store = make_store(tmp_path / "store", folder, [teacher], source="first")
    before = stamps(store)
    other = dataclasses.replace(
        load_teacher(checkpoint),
        preprocessing=dataclasses.replace(teacher.preprocessing, size=(48, 48)),
    )
    store = make_store(
        tmp_path / "store", folder, [other], source="second", crops=None, form="hard"
    )
    assert unchanged(before, store)
    assert store.sources() == ["first", "second"]
    for source in ("first", "second"):
        settings = train_settings(target="hard", source=source, epochs=2)
        run = prepare_run(tmp_path / source, folder, store, settings)
        assert run.feed.data.facts["sources"] == [f"labels/{source}"]
    with pytest.raises(FkdpipeError, match="choose one with --source"):
        prepare_run(tmp_path / "none", folder, store, train_settings(target="hard"))


def test_the_default_source_is_the_teachers_names(tmp_path, folder, teacher):
    store = make_store(tmp_path / "store", folder, [teacher], source="")
    assert store.sources() == ["test_resnet"]


@pytest.mark.parametrize("code", ["float16", "int8"])
@pytest.mark.parametrize("layer", ["pre", "post"])
def test_features_are_those_of_the_teacher_on_the_same_crops(
    tmp_path, folder, checkpoint, teacher, code, layer
):
    store = make_store(tmp_path / "store", folder, [teacher])
    before = stamps(store)
    network = load_teacher(checkpoint, needs=Needs(pre=True, penultimate=True))
    store = make_store(
        tmp_path / "store", folder, [network], form=None, crops=None, features=(layer,),
        features_code=code,
    )  # fmt: skip
    assert unchanged(before, store)
    assert not verify.verify(store, full=True)
    part = store.part(f"rounds/0/features/t/{layer}")
    values = arrays_of(store)
    kept = features.decode(
        code, {f.name: values[f"{part.path}/{f.name}"].astype(f.dtype) for f in part.fields}
    )
    run = prepare_run(
        tmp_path / "run", folder, store, train_settings(target="hard", crops_per_image=4)
    )
    for batch in run.crops.stream():
        made = network.outputs(batch.pixels)
        exact = (made.pre if layer == "pre" else made.penultimate).numpy()
        stored = kept[batch.rows, batch.crops]
        scale = np.abs(exact).max(1, keepdims=True)
        assert (np.abs(stored - exact) / scale).max() <= features.error_bound(code) + 1e-3
        break
    checked = check.teacher(store, part, folder, [network], device=CPU)
    assert checked.crops > 0
    assert not checked.problems


def test_the_two_taps_differ_and_a_store_tells_them_apart(tmp_path, folder, checkpoint):
    network = load_teacher(checkpoint, needs=Needs(pre=True, penultimate=True))
    store = make_store(tmp_path / "store", folder, [network], form="none", features=("pre", "post"))
    values = arrays_of(store)
    pre, post = (values[f"rounds/0/features/t/{layer}/value"] for layer in ("pre", "post"))
    assert (pre < 0).any()
    assert (post >= 0).all()
    assert store.sources("features", "pre") == store.sources("features", "post") == ["t"]
    assert store.sources("labels") == []


@pytest.mark.parametrize("code", ["float16", "int8"])
def test_feature_codes_keep_their_bound(code):
    random = np.random.default_rng(0)
    x = (random.normal(size=(300, 40)) * np.exp(random.normal(size=(300, 1)) * 2)).astype(
        np.float32
    )
    x[0] = 0
    kept = features.decode(code, features.encode(code, x))
    scale = np.maximum(np.abs(x).max(1, keepdims=True), 1e-30)
    assert (np.abs(kept - x) / scale).max() <= features.error_bound(code)
    assert np.array_equal(kept[0], x[0])
    assert np.array_equal(np.sign(kept) * np.sign(x) >= 0, np.ones_like(x, dtype=bool))


def test_int8_after_a_cube_root_is_far_better_for_power_scaling_than_plain_int8():
    """Mean squared error after sign(f) |f / 0.1|^(1/3), relative; the plain byte as a control."""
    x = np.random.default_rng(1).normal(size=(2000, 64)).astype(np.float32)

    def scaled(f):
        return np.sign(f) * np.abs(f / 0.1) ** (1 / 3)

    ours = features.decode("int8", features.encode("int8", x))
    step = np.abs(x).max(1, keepdims=True) / 127
    plain = np.rint(x / step) * step
    error = [np.mean((scaled(a) - scaled(x)) ** 2) / np.mean(scaled(x) ** 2) for a in (ours, plain)]
    assert error[0] < 1e-4
    assert error[1] > 10 * error[0]


def test_components_need_a_basis(tmp_path, folder, teacher):
    with pytest.raises(UsageError, match="leading components need a basis"):
        GenerateSettings(teacher=("t",), features=("pre:8",))
    with pytest.raises(UsageError, match="there is nothing to generate"):
        GenerateSettings(teacher=("t",), form="none")
    with pytest.raises(UsageError, match="invalid features"):
        GenerateSettings(teacher=("t",), features=("middle",))


def test_the_teacher_check_passes_and_can_fail(tmp_path, folder, teacher, checkpoint):
    for form in ("topk:3", "topk:3:compact", "full", "logits", "hard"):
        store = make_store(tmp_path / form, folder, [teacher], form=form)
        part = store.part("rounds/0/labels/t")
        checked = check.teacher(store, part, folder, [teacher], device=CPU, sample=20)
        assert checked.crops == 20
        assert not checked.problems, form
        assert checked.worst <= checked.allowed
    with torch.no_grad():
        changed = load_teacher(checkpoint)
        for parameter in changed.module.network.get_classifier().parameters():
            parameter.mul_(0.5)
    checked = check.teacher(store, part, folder, [changed], device=CPU)
    assert checked.problems == ()  # halving the logits changes no first choice ...
    store = make_store(tmp_path / "again", folder, [teacher], form="topk:3")
    checked = check.teacher(store, store.part("rounds/0/labels/t"), folder, [changed], device=CPU)
    assert {p.code for p in checked.problems} == {"teacher-differs"}  # ... but probabilities
    other = dataclasses.replace(teacher, digest="0" * 64)
    with pytest.raises(StoreMismatchError, match="made by other teachers"):
        check.teacher(store, part, folder, [other], device=CPU)


def test_the_folder_check_names_what_changed(tmp_path, folder, teacher):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(folder, data)
    store = make_store(tmp_path / "store", data, [teacher])
    assert check.folder(store, data) == []
    (data / "train" / "ash" / "0.jpg").unlink()
    shutil.copy(data / "train" / "ash" / "1.jpg", data / "train" / "ash" / "new.jpg")
    with open(data / "train" / "ash" / "2.jpg", "ab") as file:
        file.write(b"\0\0")
    assert [(p.code, p.detail) for p in check.folder(store, data)] == [
        ("image-missing", "ash/0.jpg"),
        ("image-extra", "ash/new.jpg"),
        ("image-changed", "ash/2.jpg"),
    ]


def test_out_of_gpu_memory_halves_the_batch_and_records_it(
    tmp_path, folder, teacher, monkeypatch, caplog
):
    monkeypatch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 16)
    whole = make_store(tmp_path / "whole", folder, [teacher], batch=8)
    plain = making.outputs.teach
    tried = []

    def small(teachers, pixels, factor):
        count = len(next(iter(pixels.values())))
        tried.append(count)
        if count > 10:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(teachers, pixels, factor)

    monkeypatch.setattr(making.outputs, "teach", small)
    store = make_store(tmp_path / "store", folder, [teacher], batch=32)
    assert [n for n in tried if n > 10] == [32, 16]
    part = store.part("rounds/0/labels/t")
    assert {m.facts["batch"] for _, m in store.markers(part)} == {8}
    assert "a teacher batch has 16 crops instead of 32" in caplog.text
    a, b = arrays_of(whole), arrays_of(store)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    monkeypatch.setattr(
        making.outputs, "teach", lambda *a: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError())
    )
    with pytest.raises(FkdpipeError, match="too little memory for a teacher batch of one crop"):
        make_store(tmp_path / "none", folder, [teacher], batch=4)


def test_a_unit_that_does_not_fit_memory_is_spooled_to_disk(tmp_path, folder, teacher, monkeypatch):
    whole = make_store(tmp_path / "whole", folder, [teacher], form="full")
    monkeypatch.setattr("fkdpipe.storage.schema.UNIT_BUFFER_BYTES", 1000)
    monkeypatch.setattr("fkdpipe.storage.schema.LEAST_UNIT_IMAGES", 2**20)  # keep the unit's size
    used = []
    plain = making.spool._on_disk
    monkeypatch.setattr(making.spool, "_on_disk", lambda *a: (used.append(a[0].path), plain(*a))[1])
    store = make_store(tmp_path / "store", folder, [teacher], form="full")
    assert used == ["rounds/0/labels/t"]
    a, b = arrays_of(whole), arrays_of(store)
    assert all(np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f") for n in a)


def test_units_shrink_with_their_buffers():
    fields = schema.label_fields(labels.Form("full"), 1000)
    assert schema.unit_images(schema.bytes_per_image(fields, 200)) == 1024
    assert schema.unit_images(schema.bytes_per_image(fields, 2000)) == 256
    assert schema.unit_images(2**40) == schema.LEAST_UNIT_IMAGES


NOT_PER_CROP = ("images", "commits")


def test_a_dry_run_predicts_and_writes_nothing(tmp_path, folder, teacher):
    settings = GenerateSettings(teacher=("t",), crops=20, source="t", form="topk:3")
    resources = generate.Resources(device=CPU, batch=16)
    predicted = dry_run.forecast(folder, settings, [teacher], resources)
    store = make_store(tmp_path / "store", folder, [teacher], crops=20)
    actual = sum(n for _, n in store.location.list())
    assert predicted.images == store.num_images
    assert predicted.crops == store.num_images * 20
    assert 0.4 < predicted.stored_bytes / actual < 2
    measured = report.measure(store)
    metadata = sum(
        len(text)
        for part in store.parts.values()
        for key, text in part.metadata.items()
        if part.kind != "images" and key != f"{part.path}/zarr.json"
    )
    arrays = sum(f.stored_bytes for n, f in measured.fields.items() if n not in NOT_PER_CROP)
    assert predicted.bytes_per_crop == pytest.approx((arrays - metadata) / predicted.crops, rel=0.3)
    assert predicted.seconds > 0
    assert predicted.units == 1
    fields = [f for part in store.parts.values() if part.round == 0 for f in part.fields]
    assert predicted.buffer_bytes == store.num_images * schema.bytes_per_image(fields, 20)


def test_a_dry_run_of_wide_labels_is_not_misled_by_chunks_that_are_not_full(folder, teacher):
    settings = GenerateSettings(teacher=("t",), crops=4, source="t", form="full")
    predicted = dry_run.forecast(
        folder, settings, [teacher], generate.Resources(device=CPU, batch=16)
    )
    raw = 2 * len(CLASSES)  # float16
    assert raw < predicted.bytes_per_crop < raw + 40  # boxes, flips; an empty rest were 30 more


def test_derived_boxes_generate_and_train_alike(tmp_path, folder, teacher):
    stored = make_store(tmp_path / "stored", folder, [teacher])
    derived = make_store(tmp_path / "derived", folder, [teacher], boxes="derived")
    assert not verify.verify(derived, full=True)
    assert derived.location.length("rounds/0/crops/box/zarr.json") is None
    batches = [
        next(
            prepare_run(tmp_path / f"r{k}", folder, s, train_settings(target="hard")).crops.stream()
        )
        for k, s in enumerate((stored, derived))
    ]
    assert torch.equal(batches[0].pixels, batches[1].pixels)
    size = [sum(n for _, n in s.location.list()) for s in (stored, derived)]
    assert size[1] < size[0]


@pytest.fixture
def growing(tmp_path, folder, teacher, monkeypatch):
    """A store of 4 crops an image whose growth to 7 was cut off after its first unit."""
    monkeypatch.setattr("fkdpipe.storage.schema.UNIT_IMAGES", 16)
    make_store(tmp_path / "store", folder, [teacher])
    plain = making.Unit.make

    def stop(self, *args):
        if self.number:
            raise KeyboardInterrupt
        return plain(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(making.Unit, "make", stop)
        with pytest.raises(KeyboardInterrupt, match=r"[1-9] of [0-9]+ units committed"):
            make_store(tmp_path / "store", folder, [teacher], crops=7)
    return open_store(tmp_path / "store")


@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_store_that_grows_can_be_read_as_far_as_it_was_finished(growing, caplog, allow_partial):
    found = reader.finished(growing, [("labels", "t", "")], allow_partial=allow_partial)
    assert found.crops_per_image == 4
    assert len(found.rows) == growing.num_images
    assert "still growing; using the first 4 crops" in caplog.text


def test_a_run_goes_on_with_the_crops_it_began_with(tmp_path, folder, teacher):
    store = make_store(tmp_path / "store", folder, [teacher])
    begun = prepare_run(tmp_path / "run", folder, store, train_settings())
    store = make_store(tmp_path / "store", folder, [teacher], crops=7)
    again = prepare_run(tmp_path / "run", folder, store, train_settings())
    assert again.digest == begun.digest
    assert again.feed.data.crops_per_image == 4
    new = prepare_run(tmp_path / "new", folder, store, train_settings())
    assert new.feed.data.crops_per_image == 7


def test_a_run_is_not_continued_on_other_labels(tmp_path, folder, teacher, checkpoint):
    """The same crops and source name, another teacher."""
    halved = dataclasses.replace(load_teacher(checkpoint), digest="0" * 64)
    stores = [make_store(tmp_path / t.digest, folder, [t]) for t in (teacher, halved)]
    prepare_run(tmp_path / "run", folder, stores[0], train_settings())
    with pytest.raises(TrainingError, match="different images, crops or labels"):
        prepare_run(tmp_path / "run", folder, stores[1], train_settings())


def test_a_dry_run_of_one_part_measures_a_whole_sample_after_its_first_batch(
    folder, teacher, monkeypatch
):
    times = iter([0.0, 100.0, 104.0])  # the task begins, its first batch is done, all is done
    clock = types.SimpleNamespace(perf_counter=lambda: next(times))
    monkeypatch.setattr(dry_run, "time", clock)
    settings = GenerateSettings(teacher=("t",), crops=20, source="t", form="topk:3")
    resources = generate.Resources(device=CPU, batch=16, rank=Rank(1, 2))
    predicted = dry_run.forecast(folder, settings, [teacher], resources)
    assert predicted.sampled_crops == 32 * 16
    assert predicted.crops_per_s == (32 * 16 - 16) / 4
    assert predicted.bytes_per_crop > 4  # labels too, not the boxes alone


def test_a_store_that_grows_keeps_its_own_distribution_and_seed(tmp_path, folder, teacher):
    distribution = CropDistribution(scale=(0.4, 1.0), flip=0.0)
    one = make_store(
        tmp_path / "one", folder, [teacher], crops=6, crop=distribution, seed=3, boxes="derived"
    )
    make_store(tmp_path / "two", folder, [teacher], crop=distribution, seed=3, boxes="derived")
    two = make_store(tmp_path / "two", folder, [teacher], crops=6)  # nothing is said again
    assert len(two.rounds()) == 2
    for part in two.rounds():
        assert dataclasses.replace(part.settings, first=0, crops=6) == one.rounds()[0].settings


def test_a_dry_run_prices_what_the_run_would_make(tmp_path, folder, teacher, checkpoint):
    make_store(tmp_path / "store", folder, [teacher], crops=3)
    words = ["--dry-run", "--teacher", f"test_resnet={checkpoint}", "--features", "post"]
    runner = CliRunner()
    told = runner.invoke(cli, ["generate", str(folder), str(tmp_path / "store"), *words])
    assert told.exit_code == 0, told.output
    assert "images x 3 crops" in told.stdout
    refused = runner.invoke(cli, ["generate", str(folder), str(tmp_path / "none"), *words])
    assert refused.exit_code == 2  # as a real run
    assert "--crops M" in refused.stderr
