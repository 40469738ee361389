"""What a reader sees: tables at 80 columns, units, singulars, rates, progress that ends."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace

import pytest
from pipeline import make_store, prepare_run, train_settings

from fkdpipe.commands import bars, terminal
from fkdpipe.commands import report as report_command
from fkdpipe.common import words
from fkdpipe.common.errors import LabelsError, StoreError, UnsealedStoreError
from fkdpipe.common.progress import shared
from fkdpipe.inspect import footprint, report
from fkdpipe.interchange import fkd
from fkdpipe.interchange.exporting import ExportSettings
from fkdpipe.storage import cache, schema
from fkdpipe.storage.store import Store, open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory, folder, teacher):
    place = tmp_path_factory.mktemp("a rather long name") / "resnet10t" / "pro"
    return make_store(place, folder, [teacher], form="topk:3:compact")


@pytest.mark.parametrize("stores", [1, 2, 3, 4])
def test_no_number_and_no_name_breaks_at_80_columns(stores, store, capsys):
    measured = report.measure(store, bounds=True)
    several = [replace(measured, url=f"{k}/resnet10t/pro") for k in range(stores)]
    for table in (footprint.store_table, footprint.side_by_side, footprint.paper_side_by_side):
        columns, rows = table(several)
        terminal.print_table("", columns, rows)
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        assert all(text in out for row in [columns, *rows] for text in row)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1_138_050, "1.14 MB"), (319_785, "320 kB"),
     (999_900, "1 MB"), (999_900_000, "1.00 GB"), (5.3e9, "5.30 GB"), (0.9e12, "0.90 TB")],
)  # fmt: skip
def test_bytes_have_a_unit_that_fits(size, text):
    assert words.size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 seconds"), (600, "10.0 minutes"), (36_000, "10.0 hours")]
)
def test_times_have_a_unit_that_fits(seconds, text):
    assert words.duration(seconds) == text


@pytest.mark.parametrize("done", [0, 1])
def test_an_unfinished_store_has_no_size_at_imagenets_scale(done, store, capsys):
    measured = report.measure(store)
    sources = tuple(replace(s, units_done=done, units=2) for s in measured.sources)
    report_command._print_report(replace(measured, sources=sources))
    out = capsys.readouterr().out
    assert f"has {done or 'none'} of its 2 units" in out
    assert "smaller" not in out
    report_command._print_report(measured)
    assert "smaller" in capsys.readouterr().out


def test_one_of_a_thing_is_singular_and_slow_rates_are_seconds_for_each(monkeypatch, capsys):
    assert [words.count(n, "file") for n in (0, 1, 1200)] == [
        "0 files",
        "1 file",
        "1,200 files",
    ]
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    with bars.Lines().task("verify", 1, "units") as advance:
        now[0] += 40
        advance(1)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "verify: 1/1 unit, 40.0 s/unit, 0:00:00 left"
    assert last == "verify: 1/1 unit in 0:00:40"


def test_a_bar_shows_rates_and_what_an_earlier_run_did_counts_for_none(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "200")
    with bars.Bars().task("generate", 100, "units", done=80) as advance:
        for _ in range(4):
            now[0] += 50
            advance(3)
    last = capsys.readouterr().err.splitlines()[-1].split()
    assert last[0] == "generate"
    assert " ".join(last[2:]) == "92/100 units 16.7 s/unit 0:03:20 left 0:02:14"


def test_several_lists_are_counted_together():
    told = []
    advance = shared(told.append, 3)
    for count in (5, 5, 4, 1):
        advance(count)
    assert sum(told) == 5


@pytest.mark.parametrize("target", ["ground-truth", "marginal-smoothing:3"])
def test_laying_out_labels_ends_at_the_number_of_images(target, store, folder, tmp_path):
    tasks = {}

    class Reporter:
        @contextlib.contextmanager
        def task(self, name, total, unit, *, done=0):
            told = tasks[name] = [total, 0]

            def advance(count):
                told[1] += count

            yield advance

    settings = train_settings(target=target)
    prepare_run(tmp_path / "run", folder, open_store(store.url), settings, reporter=Reporter())
    assert tasks["labels"] == [store.num_images, store.num_images]


@pytest.mark.parametrize("keep", [1, 3])
def test_what_fkds_trainer_cannot_use_is_said_before_writing(keep, store, tmp_path, caplog):
    (tmp_path / "there").touch()  # so that nothing is written
    with pytest.raises(LabelsError):
        fkd.write_labels(store, tmp_path, ExportSettings(keep=keep))
    assert ("K = 5 and 10; these labels keep 3" in caplog.text) == (keep == 3)


def test_a_full_cache_and_an_open_store_say_what_is_so(tmp_path, folder, teacher, monkeypatch):
    store = make_store(tmp_path / "store", folder, [teacher])
    usage = shutil.disk_usage(tmp_path)._replace(free=900)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(StoreError, match=r"needs [\d.]+ kB and .* has 900 B free"):
        cache._require_space(store, schema.crop_fields(), 4, tmp_path)
    part = store.part("rounds/0/crops")
    store.location.delete("commits/rounds/0/crops/manifest.json")
    with pytest.raises(UnsealedStoreError, match=r"1 unit committed, but the manifest is missing"):
        Store(store.location).sealed(part)
