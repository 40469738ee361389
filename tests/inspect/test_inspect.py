"""Contact sheets and pages: which crops, their pixels and bars, and text that cannot do harm."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re

import numpy as np
import oracles
import pytest
import torch
from click.testing import CliRunner
from markupsafe import escape
from PIL import Image
from pipeline import make_store
from random_store import make_store as make_random_store
from test_entropy import make_features_store

from fkdpipe.cli import cli
from fkdpipe.commands import terminal
from fkdpipe.common.errors import ReplayError, StoreError, UsageError
from fkdpipe.inspect import analysis, choose, measures, pages, plots, sheet, sources, views
from fkdpipe.inspect.choose import Choice, Chosen
from fkdpipe.inspect.views import Bar, CropView, ImageView, LabelView, Views
from fkdpipe.pixels import colour
from fkdpipe.pixels.crops import CropDistribution, Jitter
from fkdpipe.storage.store import open_store

HOSTILE = ("<b>\"bold\" & 'x'", "a\nb", "x" * 80, "éλя‮", "<img src=x onerror=alert(1)>")


def invoke(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture(scope="module")
def store(tmp_path_factory, folder, teacher):
    """Real pictures with two sources of the same teacher, `full` and `three`."""
    place = tmp_path_factory.mktemp("inspect") / "store"
    for source, form in (("full", "full"), ("three", "topk:3")):
        make_store(place, folder, [teacher], form=form, source=source, crops=4)
    return open_store(place)


@pytest.fixture
def opened(store, tmp_path):
    return sources.open_labels(store, ["full"], tmp_path / "cache")


def every_label(opened):
    """(N, M, C) of all rows, which are 0 to N - 1 here."""
    crops_M = np.arange(opened.finished.crops_per_image)
    assert opened.finished.rows.tolist() == list(range(51))
    return np.stack([opened.labels[0].take(np.array([row]), crops_M)[0] for row in range(51)])


def scores_of(opened, by):
    prob = every_label(opened)
    true_NM = [image[:, t] for image, t in zip(prob, opened.truth_N, strict=True)]
    return {
        "sure": prob.max(-1),
        "unsure": -prob.max(-1),
        "entropy": measures.entropy(prob.reshape(-1, 5)).reshape(51, 4),
        "worst": -np.array(true_NM),
    }[by]


@pytest.mark.parametrize("by", ["sure", "unsure", "entropy", "worst"])
def test_ranked_crops_are_the_first_of_all_one_an_image(opened, by):
    found = choose.choose(opened, Choice(by=by, count=5), opened.finished.rows)
    score_NM = scores_of(opened, by)
    expected = np.sort(score_NM.max(axis=1))[::-1][:5]
    made = [score_NM[each.row, each.crops[0]] for each in found]
    assert len({each.row for each in found}) == 5
    assert all(len(each.crops) == 1 for each in found)
    assert made == pytest.approx(expected.tolist(), abs=1e-3)


def test_disagreement_is_the_distance_of_two_sources(store, tmp_path):
    opened = sources.open_labels(store, ["full", "three"], tmp_path / "cache")
    found = choose.choose(opened, Choice(by="disagreement", count=3), opened.finished.rows)
    crops_M = np.arange(4)
    largest = max(
        0.5 * np.abs(a - b).sum()
        for row in range(51)
        for a, b in zip(
            *(each.take(np.array([row]), crops_M)[0] for each in opened.labels), strict=True
        )
    )
    assert found[0].score == pytest.approx(largest, abs=1e-6)
    assert [each.score for each in found] == sorted((e.score for e in found), reverse=True)


def test_stored_order_is_the_stores_own(opened):
    found = choose.choose(opened, Choice(count=3, crops=2), opened.finished.rows[4:])
    assert found == [Chosen(4, (0, 1)), Chosen(5, (0, 1)), Chosen(6, (0, 1))]
    assert choose.choose(opened, Choice(crops=99), opened.finished.rows[:1])[0].crops == (
        0,
        1,
        2,
        3,
    )


def test_one_class_one_image_or_one_crop(opened):
    found = choose.choose(opened, Choice(class_name="cedar", count=99), opened.finished.rows)
    names = [str(opened.store.images.keys[each.row]).split("/")[0] for each in found]
    assert names == ["cedar"] * 19
    key = str(opened.store.images.keys[7])
    found = choose.choose(
        opened, Choice(image=key, by="entropy", crops=3), opened.finished.rows[:2]
    )
    score_M = scores_of(opened, "entropy")[7]
    assert found[0].row == 7
    assert score_M[list(found[0].crops)].tolist() == sorted(score_M, reverse=True)[:3]
    assert choose.one_crop(opened, f"{key}:3") == Chosen(7, (3,))


def test_what_cannot_be_chosen_says_what_can(opened, tmp_path):
    key = str(opened.store.images.keys[7])
    with pytest.raises(StoreError, match=f"Did you mean .*{re.escape(key)}"):
        choose.row_of(opened, key + "x")
    with pytest.raises(StoreError, match="crops 0 to 3"):
        choose.one_crop(opened, f"{key}:4")
    for text in (key, f"{key}:", ":3", f"{key}:-1"):
        with pytest.raises(UsageError, match="KEY:INDEX"):
            choose.one_crop(opened, text)
    with pytest.raises(StoreError, match="Did you mean cedar"):
        choose.choose(opened, Choice(class_name="ceder"), opened.finished.rows)
    with pytest.raises(StoreError, match="It has ash, beech, cedar, date palm, élm"):
        choose.choose(opened, Choice(class_name="0"), opened.finished.rows)
    with pytest.raises(StoreError, match=f"One of its images is {opened.store.images.keys[0]}"):
        choose.row_of(opened, "0")
    with pytest.raises(StoreError, match="search more with --limit"):
        choose.choose(opened, Choice(class_name="cedar"), opened.finished.rows[:0])
    with pytest.raises(UsageError, match="name two with --source"):
        choose.choose(opened, Choice(by="disagreement"), opened.finished.rows)
    with pytest.raises(UsageError, match="at least 1"):
        Choice(count=0)
    blind = sources.open_labels(make_random_store(tmp_path / "s"), [], tmp_path / "cache")
    for choice in (Choice(by="worst"), Choice(class_name="c1")):
        with pytest.raises(StoreError, match="no classes"):
            choose.choose(blind, choice, blind.finished.rows)


def test_views_are_what_replay_and_the_store_say(opened, folder):
    chosen = [Chosen(row, (0, 1, 2, 3)) for row in range(51)]
    found = views.look(opened, folder, chosen, side=48, picture=64)
    assert len(found.images) == 51
    assert found.left_out == ()
    flips = 0
    for row, image in enumerate(found.images):
        assert image.key == opened.store.images.keys[row]
        assert image.class_name == image.key.split("/")[0]
        assert max(image.picture.shape[:2]) == 64
        assert (
            abs(image.picture.shape[0] / image.picture.shape[1] - image.size[0] / image.size[1])
            < 0.05
        )
        for crop in image.crops:
            prob_C = opened.labels[0].take(np.array([row]), np.array([crop.index]))[0, 0]
            (label,) = crop.labels
            assert label.bars[0].probability == prob_C.max()
            assert sum(bar.probability for bar in label.bars) + label.rest == pytest.approx(1)
            (truth,) = (bar for bar in label.bars if bar.truth)
            assert truth.name == image.class_name
            assert truth.probability == prob_C[opened.class_names.index(truth.name)]
            assert label.agrees is (label.bars[0].truth)
            flips += crop.flip
            if image.key.endswith(".png") and "colour" in image.key:
                path = folder / "train" / image.key
                expected = oracles.pillow_crop(path, crop.box, crop.flip, (48, 48), "bilinear")
                assert np.abs(crop.pixels.astype(int) - expected).max() <= 2
    assert 0 < flips < 51 * 4


def test_recorded_colours_are_shown_as_both_phases_see_them(tmp_path, folder, teacher):
    distribution = CropDistribution(jitter=Jitter(brightness=0.8, saturation=0.8, hue=0.3))
    place = make_store(tmp_path / "store", folder, [teacher], form="full", crop=distribution)
    opened = sources.open_labels(place, [], tmp_path / "cache")
    row = choose.row_of(opened, "cedar/deeper/colour.png")
    (image,) = views.look(opened, folder, [Chosen(row, (0, 1, 2, 3))], side=48).images
    factor_m4 = opened.boxes.take(np.array([row]), np.arange(4)).jitter_NM4[0]
    for crop, factor_4 in zip(image.crops, factor_m4, strict=True):
        path = folder / "train" / image.key
        plain = oracles.pillow_crop(path, crop.box, crop.flip, (48, 48), "bilinear").copy()
        seen = torch.from_numpy(plain.transpose(2, 0, 1)[None].copy())
        made = colour.jitter(seen, torch.from_numpy(factor_4[None]))[0].numpy().transpose(1, 2, 0)
        assert np.abs(crop.pixels.astype(int) - made).mean() < 2
        assert np.abs(crop.pixels.astype(int) - plain).mean() > 4
        assert crop.jitter
        assert sheet.facts_of(crop).endswith("◐")


def test_exif_orientation_is_not_applied(opened, folder):
    row = choose.row_of(opened, "cedar/deeper/rotated.jpg")
    (image,) = views.look(opened, folder, [Chosen(row, (0,))]).images
    assert image.size == (70, 110)
    assert image.picture.shape[1] > image.picture.shape[0]


def test_images_that_cannot_be_read_are_left_out_and_named(opened, folder, tmp_path):
    import shutil

    other = tmp_path / "images"
    shutil.copytree(folder, other)
    keys = [str(key) for key in opened.store.images.keys[:3]]
    (other / "train" / keys[0]).unlink()
    Image.new("RGB", (9, 9)).save(other / "train" / keys[1], "JPEG")
    found = views.look(opened, other, [Chosen(row, (0,)) for row in range(3)])
    assert [image.key for image in found.images] == keys[2:]
    assert [why.split(":")[0] for why in found.left_out] == keys[:2]
    assert "recorded" in found.left_out[1]
    assert keys[0] in pages.sheet_page(found, title="t", lead="l")
    assert sheet.draw(found, title="t").height > 100
    with pytest.raises(ReplayError, match="no image can be shown") as caught:
        views.look(opened, other, [Chosen(0, (0,))])
    assert "other images" not in str(caught.value)


def test_a_folder_of_other_images_is_said(opened, tmp_path):
    (tmp_path / "other" / "rocket").mkdir(parents=True)
    key = opened.store.images.keys[0]
    with pytest.raises(ReplayError, match=f"found rocket; expected images like {re.escape(key)}"):
        views.look(opened, tmp_path / "other", [Chosen(0, (0,))])


def an_image(key="a/b.jpg", name="a", names=("a", "b"), box=(10, 40, 20, 50)) -> ImageView:
    """A made-up image, 100 high and 200 wide."""
    bars = tuple(Bar(n, p, p < 0.5) for n, p in zip(names, (0.7, 0.2), strict=True))
    label = LabelView("teacher", bars, 0.1, agrees=False, entropy=0.8)
    pixels = np.full((64, 64, 3), 90, dtype=np.uint8)
    crop = CropView(3, box, True, True, pixels, (label,))
    return ImageView(key, name, (100, 200), np.full((50, 100, 3), 200, np.uint8), (crop,))


def test_boxes_are_drawn_where_they_are():
    """An image half its size: the box (top 10, left 40, 20 high, 50 wide) starts at (5, 20)."""
    drawn = np.asarray(sheet.with_boxes(an_image()))
    colour = tuple(int(sheet.BOXES[0][k : k + 2], 16) for k in (1, 3, 5))
    rows, columns = np.nonzero((drawn == colour).all(axis=-1))
    assert (rows.min(), rows.max()) == (5, 14)
    assert (columns.min(), columns.max()) == (20, 44)
    assert (drawn[10, 32] == 200).all()


def test_a_sheet_has_room_for_every_card():
    one = sheet.draw(Views((an_image(),), ()), title="one")
    many = sheet.draw(Views((an_image(),) * 9, ("x: gone",)), title="many")
    assert many.width <= sheet.WIDTH + 2 * sheet.GAP
    assert many.height > one.height
    data = sheet.to_png(many)
    with Image.open(io.BytesIO(data)) as read:
        assert (read.format, read.size) == ("PNG", many.size)
    assert len(np.unique(np.asarray(many).reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name):
    view = an_image(key=f"{name}/1.jpg", name=name, names=(name, name + "2"))
    found = Views((view,), (f"{name}: gone",))
    text = pages.sheet_page(found, title=name, lead=name)
    assert '<b>"' not in text
    assert "<img src=x" not in text
    assert "<script" not in text.lower()
    assert sheet.draw(found, title=name).width > 0
    assert sheet.elide(name, 60, 11).isprintable()


def test_long_text_loses_its_middle():
    short = sheet.elide("a" * 50 + "b" * 50, 100, 12)
    assert sheet.font(12).getlength(short) <= 100
    assert short[0] == "a"
    assert short[-1] == "b"
    assert "…" in short
    assert sheet.elide("cat", 100, 12) == "cat"


def test_shares_are_written_for_people():
    written = [sheet.percent(p) for p in (0, 1e-5, 0.0042, 0.0994, 0.0996, 0.631, 1)]
    assert written == ["0 %", "<0.1 %", "0.4 %", "9.9 %", "10 %", "63 %", "100 %"]


def test_an_analysis_page_stands_alone(store, tmp_path):
    opened = sources.open_labels(store, ["full", "three"], tmp_path / "cache")
    found = analysis.analyse(opened, opened.finished.rows, np.arange(4))
    text = pages.analysis_page(found)
    panels = plots.analysis_panels(found)
    assert len(panels) == 8
    assert text.count("data:image/png;base64,") == len(panels)
    assert "http" not in text
    assert all(name in text for name in store.images.class_names)
    columns, rows = pages.class_distances(found)
    place = found.class_names.index(rows[2][0])
    assert columns[1:] == [
        "full → one-hot", "three → one-hot", "full → three", "three → full",
    ]  # fmt: skip
    assert rows[2][3] == pages.number(found.distance_CAA[place, 2, 3])
    data = plots.to_png(plots.together(panels, "all"), dpi=40)
    with Image.open(io.BytesIO(data)) as read:
        assert read.width == 460
        assert len(read.convert("RGB").getcolors(1 << 20)) > 50


def test_an_analysis_without_ground_truth_has_what_remains(tmp_path):
    opened = sources.open_labels(make_random_store(tmp_path / "s"), [], tmp_path / "cache")
    found = analysis.analyse(opened, opened.finished.rows[:64], np.arange(4))
    panels = plots.analysis_panels(found)
    assert [panel.title for panel in panels] == [
        "Entropy of the labels",
        "Largest probability",
        "Probability of the K most probable classes",
    ]
    text = pages.analysis_page(found)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text)


@pytest.mark.parametrize("names", [HOSTILE, ("$", "$a$b", "\\frac{$", "日本", "[red]")])
def test_hostile_class_names_do_not_break_plots_or_tables(store, tmp_path, names, capsys):
    opened = sources.open_labels(store, ["full"], tmp_path / "cache")
    found = analysis.analyse(opened, opened.finished.rows, np.arange(4))
    classes = tuple(
        dataclasses.replace(c, name=n) for c, n in zip(found.classes, names, strict=True)
    )
    named = dataclasses.replace(found, class_names=names, classes=classes)
    text = pages.analysis_page(named)
    assert all(str(escape(name)) in text for name in names)
    terminal.print_table("", pages.CLASS_COLUMNS, pages.class_rows(named))
    printed = capsys.readouterr().out
    assert ("[red]" in printed) is ("[red]" in names)
    assert "\u202e" not in printed


def test_the_commands_write_pictures_and_pages(store, folder, tmp_path):
    common = [store.url, folder, "--source", "full", "--cache", tmp_path / "cache"]
    for name, extra in {
        "all.png": ["--count", "3"],
        "worst.html": ["--by", "worst", "--count", "3"],
        "crop.png": ["--crop", "cedar/deeper/rotated.jpg:2"],
    }.items():
        made = invoke("inspect", *common, "--out", tmp_path / name, *extra)
        assert made.exit_code == 0, made.output
        assert made.stdout.count("\n") == 1
        assert (tmp_path / name).stat().st_size > 1000
    with Image.open(tmp_path / "all.png") as read:
        assert read.format == "PNG"
    assert (tmp_path / "worst.html").read_text().startswith("<!doctype html>")


def test_analyse_prints_tables_or_one_object(store, folder, tmp_path, checkpoint):
    common = [store.url, "--source", "full", "--cache", tmp_path / "cache"]
    model = ["--model", f"test_resnet={checkpoint}"]
    made = invoke(
        "analyse", store.url, folder, *common[1:], *model, "--limit", "10", "--crops", "2",
        "--json", "--out", tmp_path / "labels.png",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    figures = json.loads(made.stdout)
    assert figures["images"] == 10
    assert figures["crops"] == 20
    assert figures["distances"]["kinds"] == [
        "one-hot", "hard", "full", "model test_resnet", "smoothing", "MS:4", "MR:4",
    ]  # fmt: skip
    assert (tmp_path / "labels.png").read_bytes()[1:4] == b"PNG"
    text = invoke("analyse", *common, "--crops", "0").stdout
    assert "51 images, 204 crops" in text
    assert "Least agreement" in text


def mistakes(store, folder, tmp_path):
    inspect = ["inspect", store.url, folder, "--source", "full"]
    out = ["--out", tmp_path / "x.png", "--cache", tmp_path / "cache"]
    features = make_features_store(tmp_path / "features").url
    absent, nowhere = tmp_path / "absent", tmp_path / "no" / "x.png"
    return {
        "unknown key": (1, "has no image", [*inspect, "--image", "a/b.jpg", *out]),
        "no such crop": (1, "crops 0 to 3", [*inspect, "--crop", "cedar/deeper/gray.jpg:9", *out]),
        "not a crop": (2, "KEY:INDEX", [*inspect, "--crop", "cedar", *out]),
        "unknown class": (1, "has no class", [*inspect, "--class", "oak", *out]),
        "no data": (1, "no such folder", ["inspect", store.url, absent, *inspect[3:], *out]),
        "no labels": (1, "holds no labels", ["inspect", features, folder, *out]),
        "nothing to analyse": (1, "holds no labels", ["analyse", features]),
        "which source": (1, "--source", ["inspect", store.url, folder, *out]),
        "kind of file": (2, "FILE.png or FILE.html", [*inspect, "--out", tmp_path / "x.gif"]),
        "no folder to write to": (2, "there is no folder", [*inspect, "--out", nowhere]),
        "no crops": (2, "at least 1", [*inspect, "--crops", "0", *out]),
        "two choices": (2, "one of --crop", [*inspect, "--image", "a.jpg", "--class", "elm", *out]),
        "two sources": (2, "name two", [*inspect, "--by", "disagreement", *out]),
        "model without data": (2, "needs DATA", ["analyse", store.url, "--model", "test_resnet"]),
    }  # fmt: skip


def test_every_mistake_has_its_exit_code_and_one_line(store, folder, tmp_path):
    for name, (code, words, command) in mistakes(store, folder, tmp_path).items():
        made = invoke(*command)
        assert made.exit_code == code, (name, made.output)
        assert words in made.stderr, name
        assert "Traceback" not in made.output
        assert not made.stdout, name


def test_numbers_that_are_not_defined_leave_their_cell_empty():
    assert pages.number(math.nan) == pages.share(math.nan) == ""
    assert pages.number(math.inf) == "∞"
    assert pages.number(0.12345) == "0.123"
