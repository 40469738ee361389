"""Entropy bounds, plans and reports of several stores."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from random_store import CROPS, IMAGES, UNIT, flip_bit, make_store

from fkdpipe.cli import cli
from fkdpipe.common.errors import DamagedStoreError, UsageError
from fkdpipe.inspect import entropy, footprint, report
from fkdpipe.pixels import crops
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import features, labels, plan, rounds, schema, writer
from fkdpipe.storage.labels import parse_form
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.plan import Features, Wanted
from fkdpipe.storage.settings import FeatureSettings


def invoke(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_closed_forms_of_order_0_entropy():
    correction = 1 / (2 * 20 * math.log(2))
    assert entropy.entropy_bits(np.repeat([3, 9], 10)) == pytest.approx(1 + correction)
    assert entropy.entropy_bits(np.zeros(7)) == 0
    assert entropy.entropy_bits(np.arange(9)) is None
    many = np.random.default_rng(0).integers(0, 256, 200_000)
    assert entropy.entropy_bits(many) == pytest.approx(8, abs=1e-3)


@pytest.mark.parametrize(
    "distribution",
    [
        CropDistribution(),
        CropDistribution(scale=(0.25, 1.0)),
        CropDistribution(scale=(0.1, 0.5), ratio=(1.0, 2.0)),
    ],
)
def test_a_box_needs_the_entropy_of_its_distribution(distribution):
    """Against the frequencies of 200,000 drawn sizes; positions are uniform by construction."""
    size = np.array([[37, 52]])
    drawn = crops.sample(
        distribution,
        seed=5,
        image_id_N=crops.image_ids(["a"]),
        size_N2=size,
        crops_M=np.arange(200_000),
    ).box_NM4[0]
    sizes = drawn[:, 2].astype(np.int64) * 1000 + drawn[:, 3]
    counted = entropy.entropy_bits(sizes)
    positions = np.log2((37.0 - drawn[:, 2] + 1) * (52.0 - drawn[:, 3] + 1)).mean()
    assert entropy.box_bits(distribution, size[0], drawn) == pytest.approx(
        counted + positions, rel=0.02
    )


def slow_ids_bits(ids_NMK) -> float:
    """The urn written out: crop by crop, class by class."""

    def bits(columns, known, weight):
        coded = [c for image in ids_NMK for crop in image for c in crop[columns]]
        share = {c: coded.count(c) / len(coded) for c in set(coded)}
        total = 0.0
        for image in ids_NMK:
            seen: list[int] = []
            for crop in image:
                for c in crop[columns]:
                    n = seen.count(c)
                    total -= math.log2((n + weight * share[c]) / (len(seen) + weight))
                seen += crop[known].tolist()
        return total / (ids_NMK.shape[0] * ids_NMK.shape[1])

    every, first, others = slice(None), slice(0, 1), slice(1, None)
    best = min(bits(first, first, w) for w in entropy.WEIGHTS)
    if ids_NMK.shape[2] == 1:
        return best
    best += min(bits(others, every, w) for w in entropy.WEIGHTS)
    return best - math.log2(math.factorial(ids_NMK.shape[2] - 1))


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_kept_classes_need_what_the_urn_says(kept):
    random = np.random.default_rng(kept)
    scores = random.normal(size=(6, 1, 30)) * 2 + random.normal(size=(6, 8, 30))
    ids = np.argsort(-scores, axis=-1)[..., :kept].astype(np.uint16)
    assert entropy.ids_bits(ids) == pytest.approx(slow_ids_bits(ids))


def test_classes_that_never_change_cost_little_and_random_ones_their_logarithm():
    image = np.arange(50) % 10
    still = np.repeat(image[:, None, None], 200, axis=1)
    assert entropy.ids_bits(still) < 0.1
    random = np.random.default_rng(0).integers(0, 64, (500, 20, 1))
    assert entropy.ids_bits(random) == pytest.approx(6, abs=0.1)


@pytest.mark.parametrize("form", ["hard", "topk:5", "topk:5:compact", "full", "logits"])
def test_every_field_has_a_bound_below_what_is_stored_or_none(tmp_path, form, monkeypatch):
    monkeypatch.setattr(entropy, "ENOUGH", 1)
    measured = report.measure(make_store(tmp_path / "store", form=form), bounds=True)
    for name, size in measured.fields.items():
        if name in ("images", "commits", "logit_max"):
            assert size.bound is None
        else:
            assert 0 < size.bound < size.bytes_per_crop
    plain = report.measure(make_store(tmp_path / "other", form=form))
    assert all(size.bound is None for size in plain.fields.values())


def test_few_values_give_no_bound(tmp_path):
    """1,500 crops are too few for float16 probabilities, but enough for bytes."""
    for form, known in (("topk:5", False), ("topk:5:compact", True)):
        store = make_store(tmp_path / form.replace(":", "-"), form=form)
        found = entropy.bytes_per_crop(store, store.part("rounds/0/labels/t"))
        assert (found["stick" if known else "prob"] is not None) is known
        assert found["ids"] > 0


def test_derived_boxes_cost_nothing(tmp_path):
    store = make_store(tmp_path / "store", derived=True)
    assert entropy.bytes_per_crop(store, store.rounds()[0]) == {}


def test_unfinished_stores_are_measured_by_what_is_committed(tmp_path):
    measured = report.measure(make_store(tmp_path / "store", seal=False), bounds=True)
    assert measured.fields["ids"].bound > 0


def test_images_that_failed_are_not_counted(tmp_path):
    """Fill values of failed rows would be one more class, and boxes of no size."""
    store = make_store(tmp_path / "store")
    part = store.part("rounds/0/labels/t")
    sampled = entropy.ids_bits(zarr.open_array(store=store.url, path=f"{part.path}/ids")[:])
    assert entropy.bytes_per_crop(store, part)["ids"] == pytest.approx(sampled / 8)
    for unit in range(store.num_units):
        rows = store.unit_rows(unit)
        values = {field.name: store.read(part, field.name, unit).copy() for field in part.fields}
        values["ids"][:20] = 65_535
        failed = dict.fromkeys(range(rows.start, rows.start + 20), ("unreadable", ""))
        writer.commit_unit(store, part, unit, values, failed=failed)
    kept = zarr.open_array(store=store.url, path=f"{part.path}/ids")[:]
    kept = kept[kept[:, 0, 0] < 65_535]
    assert len(kept) == IMAGES - 60
    found = entropy.bytes_per_crop(store, part)["ids"]
    assert found == pytest.approx(entropy.ids_bits(kept) / 8)


def test_a_damaged_unit_is_not_measured(tmp_path):
    store = make_store(tmp_path / "store")
    flip_bit(tmp_path / "store" / "rounds/0/labels/t/ids/c/0/0/0")
    with pytest.raises(DamagedStoreError):
        report.measure(store, bounds=True)


def one(**wanted):
    settings = {"images": 1000, "crops": 10, "classes": 100, "forms": (parse_form("full"),)}
    (store,) = plan.plan(Wanted(**{**settings, **wanted})).stores
    return store


def test_a_plan_of_wide_forms_is_arithmetic():
    made = one(
        features=(Features(64), Features(32, "int8")),
        derived_boxes=True,
        teacher_throughput=10_000 / 3600,
        train_throughput=100.0,
    )
    per_crop = 2 * 100 + 2 * 64 + 32 + plan.SCALE_BYTES
    assert sum(made.fields.values()) == pytest.approx(per_crop)
    fixed = plan.FIXED_BYTES + 1000 * plan.IMAGE_BYTES
    assert made.stored_bytes == round(10_000 * per_crop + fixed)
    assert made.teacher_hours == pytest.approx(1)
    assert made.streamed_bytes_per_crop == 2 * 100 + 2 * 64 + 32 + 4
    assert made.read_bytes_per_second == 100 * made.streamed_bytes_per_crop
    assert made.cache_bytes == 10_000 * (8 + 1)  # boxes and flips, laid out


@pytest.mark.parametrize("form", ["hard", "topk:5", "topk:5:compact", "logits"])
def test_a_plans_cache_is_what_the_narrow_arrays_take(tmp_path, form):
    store = make_store(tmp_path / "store", form=form)
    made = one(images=IMAGES, crops=CROPS, classes=40, forms=(parse_form(form),))
    narrow = [f for part in store.parts.values() for f in part.fields if f.per_crop and not f.wide]
    assert made.cache_bytes == IMAGES * schema.bytes_per_image(narrow, CROPS)


def test_kept_classes_are_planned_between_what_was_measured():
    for k, (ids, prob, stick) in plan.MEASURED.items():
        form = parse_form(f"topk:{k}")
        assert plan.label_bytes(form, 1000) == pytest.approx({"ids": ids, "prob": prob})
        compact = plan.label_bytes(parse_form(f"topk:{k}:compact"), 1000)
        assert compact == pytest.approx({"ids": ids, "stick": stick})
    sizes = [sum(plan.label_bytes(parse_form(f"topk:{k}"), 1000).values()) for k in range(1, 200)]
    assert np.all(np.diff(sizes) > 0)
    small, large = (plan.label_bytes(parse_form("topk:10"), c)["ids"] for c in (100, 21_841))
    assert small < plan.MEASURED[10][0] < large


@pytest.mark.parametrize(
    "wanted",
    [
        {"images": 0},
        {"crops": 0},
        {"forms": (parse_form("topk:101"),)},
        {"teacher_throughput": 0.0},
        {"train_throughput": -1.0},
    ],
)
def test_plans_that_cannot_be_are_refused(wanted):
    with pytest.raises(UsageError):
        one(**wanted)


def test_features_are_written_with_their_code():
    assert plan.parse_features("512") == Features(512, "float16")
    assert plan.parse_features("64:int8") == Features(64, "int8")
    for text in ("0", "a", "64:int4", "64:"):
        with pytest.raises(UsageError, match="D:int8"):
            plan.parse_features(text)


def test_every_row_of_table_2_stands_beside_the_store(tmp_path):
    measured = report.measure(make_store(tmp_path / "store"))
    rows = {row.name: row for row in measured.table}
    assert set(rows) == {*report.PAPER_TABLE_2, *report.PAPER_MAPS}
    assert {name for name, row in rows.items() if row.this} == set(measured.paper)
    assert rows["marginal-smoothing:10"].this is None
    assert all(rows[name].planned < size for name, size in report.PAPER_TABLE_2.items())
    form = plan.paper_form(labels.parse_target("marginal-renorm:5"))
    assert form == parse_form("topk:5")


def test_reports_as_json_are_one_object(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    make_store(first)
    make_store(second, form="hard")
    alone = json.loads(invoke("report", first, "--json").stdout)
    assert alone["fields"]["ids"]["entropy_bytes_per_crop"] > 0
    assert len(alone["table_2"]) == 8
    both = json.loads(invoke("report", first, second, "--json").stdout)
    assert [each["store"] for each in both["stores"]] == [str(first), str(second)]
    assert both["stores"][0]["stored_bytes"] == alone["stored_bytes"]
    made = invoke(
        "plan", "--form", "hard", "--form", "topk:10", "--features", "64:int8",
        "--teacher-throughput", "1000", "--json",
    )  # fmt: skip
    planned = json.loads(made.stdout)["plan"]
    assert [store["form"] for store in planned["stores"]] == ["hard", "topk:10"]
    assert planned["stores"][0]["teacher_hours"] == pytest.approx(1_281_167 * 200 / 3.6e6)
    assert planned["features"] == ["64:int8"]


def test_reports_and_plans_as_text_and_as_pages(tmp_path):
    make_store(tmp_path / "a" / "store")
    make_store(tmp_path / "b" / "store", form="full")
    page = tmp_path / "page.html"
    made = invoke("report", tmp_path / "a/store", tmp_path / "b/store", "--html", page)
    assert made.exit_code == 0, made.output
    assert "a/store" in made.stdout
    assert "b/store" in made.stdout
    text = page.read_text()
    assert text.count('<img src="data:image/png;base64,') == 2
    assert "http" not in text
    made = invoke("plan", "--features", "512", "--html", page)
    assert made.exit_code == 0, made.output
    assert "features 512:float16" in made.stdout
    assert "features 512:float16" in page.read_text()
    assert page.read_text().count('<img src="data:image/png;base64,') == 2
    assert max(map(len, made.stdout.splitlines())) <= 80


def test_no_line_of_a_report_is_longer_than_a_terminal(tmp_path):
    make_store(tmp_path / "store", form="full")
    lines = invoke("report", tmp_path / "store").stdout.splitlines()[1:]  # the first names a path
    assert "  marginal-renorm (any K)" in lines
    assert max(map(len, lines)) <= 80


def test_a_label_of_more_classes_than_there_are_is_not_served(tmp_path):
    measured = report.measure(make_store(tmp_path / "store", form="full"))
    few = dataclasses.replace(measured, classes=7)
    served = {row[0]: row[2] for row in footprint.paper_rows(few)[1]}
    assert served["marginal-smoothing:5"]
    assert not served["marginal-smoothing:10"]


def test_a_store_of_features_alone_is_reported(tmp_path):
    make_features_store(tmp_path / "store")
    made = invoke("report", tmp_path / "store")
    assert made.exit_code == 0, made.output
    assert "no labels" in made.stdout
    assert "value" in made.stdout
    figures = json.loads(invoke("report", tmp_path / "store", "--json").stdout)
    assert figures["form"] == ""


def make_features_store(place):
    store = writer.create_store(
        LocalLocation(place),
        writer.ImageColumns(
            keys=["a/1.jpg", "a/2.jpg"],
            class_N=np.zeros(2, dtype=np.int32),
            size_N2=np.full((2, 2), 50, dtype=np.uint16),
            bytes_N=np.array([9, 9]),
            class_names=["a"],
            rejected=[],
            fingerprint="f" * 64,
        ),
        seed=0,
        unit=UNIT,
    )
    part = writer.add_crops(store, CropDistribution(), seed=0, count=2)
    settings = FeatureSettings("post", dims=3, width=3, code="float16", crops=2)
    taught = writer.add_part(
        store, "rounds/0/features/t/post", settings, features.fields(3, "float16")
    )

    drawn = rounds.draw(store, part, 0)
    values = {"box": drawn.box_NM4, "flip": drawn.flip_NM}
    writer.commit_unit(store, part, 0, values, facts={"crops_crc32c": rounds.checksum(drawn)})
    writer.commit_unit(store, taught, 0, {"value": np.ones((2, 2, 3), dtype=np.float16)})
    assert writer.seal(store, part)
    assert writer.seal(store, taught)
    return store


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "Missing argument 'STORE...'"),
        (["report", "store", "--html", "page.png"], "the file name must end in .html"),
        (["plan", "store"], "unexpected extra argument"),
        (["plan", "--form", "soft"], "is not a form"),
        (["plan", "--classes", "5", "--form", "topk:10"], "keeps 10 of 5"),
        (["plan", "--html", "page.png"], "the file name must end in .html"),
        (["plan", "--html", "no/page.html"], "folder no does not exist"),
    ],
)
def test_reports_and_plans_that_cannot_be_are_refused_as_usage(words, message):
    made = invoke(*words)
    assert made.exit_code == 2
    assert message in made.stderr
    assert not made.stdout
