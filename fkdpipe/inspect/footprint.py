"""Storage reports and plans as tables, plots and a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from fkdpipe.common import words
from fkdpipe.inspect.html import Section, Table, sections_page
from fkdpipe.inspect.plots import COLOURS, Panel
from fkdpipe.inspect.report import PaperRow, StorageReport
from fkdpipe.storage.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def names_of(reports: Sequence[StorageReport]) -> list[str]:
    """Short names of the stores: the shortest distinct suffixes of their paths."""
    parts = [PurePosixPath(r.url).parts or (r.url,) for r in reports]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def field_table(r: StorageReport) -> Table:
    """Bytes of each field: stored, and per crop stored, uncompressed and with an ideal code."""
    crops = max(r.images * r.crops_per_image, 1)
    rows = [
        [
            name,
            f"{size.stored_bytes:,}",
            f"{size.bytes_per_crop:.3f}",
            f"{size.raw_bytes / crops:.3f}" if size.raw_bytes else "",
            "" if size.bound is None else f"{size.bound:.3f}",
            f"{size.ratio:.2f}" if size.raw_bytes else "",
        ]
        for name, size in r.fields.items()
    ]
    rows.append(["total", f"{r.stored_bytes:,}", f"{r.bytes_per_crop:.3f}", "", "", ""])
    columns = ["field", "No. bytes stored", "bytes per crop", "raw", "entropy", "Storage ratio"]
    return columns, rows


def _at_paper_size(row: PaperRow, r: StorageReport) -> int | None:
    """Size of a store at the paper's scale, if it is finished and serves the row's label."""
    k = row.name.partition(":")[2]
    return None if not r.finished or (k.isdigit() and int(k) > r.classes) else row.this


def paper_rows(r: StorageReport) -> Table:
    """The FKD paper's Table 2, with this store and a planned store of each label."""
    rows = [
        [
            row.name,
            words.gigabytes(row.paper),
            "" if (this := _at_paper_size(row, r)) is None else words.gigabytes(this),
            "" if this is None else f"{row.paper / this:.1f}",
            "" if row.planned is None else words.gigabytes(row.planned),
        ]
        for row in r.table
    ]
    return ["Table 2", "FKD paper", "this store", "smaller", "planned"], rows


def store_table(reports: Sequence[StorageReport]) -> Table:
    """One row per store."""
    rows = [
        [
            name,
            r.form or "no labels",
            f"{r.images:,}",
            str(r.crops_per_image),
            f"{r.classes:,}",
            words.size(r.stored_bytes),
            f"{r.bytes_per_crop:.2f}" if r.finished else "",
            words.gigabytes(r.imagenet) if r.finished else "",
        ]
        for name, r in zip(names_of(reports), reports, strict=True)
    ]
    columns = ["store", "form", "images", "crops", "classes", "stored", "B/crop", "ImageNet"]
    return columns, rows


def side_by_side(reports: Sequence[StorageReport]) -> Table:
    """Bytes per crop of each field, one column per store; an ideal code's in parentheses."""
    fields = sorted({name for r in reports for name in r.fields})
    rows = []
    for field in fields:
        cells = []
        for r in reports:
            size = r.fields.get(field)
            if size is None:
                cells.append("")
            elif size.bound is None:
                cells.append(f"{size.bytes_per_crop:.2f}")
            else:
                cells.append(f"{size.bytes_per_crop:.2f} ({size.bound:.2f})")
        rows.append([field, *cells])
    rows.append(["total", *(f"{r.bytes_per_crop:.2f}" for r in reports)])
    return ["bytes per crop", *names_of(reports)], rows


def paper_side_by_side(reports: Sequence[StorageReport]) -> Table:
    """Table 2 with a column per store, at the paper's scale."""
    rows = []
    for index, row in enumerate(reports[0].table):
        cells = [_at_paper_size(r.table[index], r) for r in reports]
        rows.append(
            [
                row.name,
                words.gigabytes(row.paper),
                *("" if cell is None else words.gigabytes(cell) for cell in cells),
            ]
        )
    return ["Table 2", "FKD paper", *names_of(reports)], rows


def plan_table(plan: Plan) -> Table:
    """Size, teacher time and read rate of each planned store."""
    columns = ["form", "B/crop", "stored", "cache", "teacher hours", "read MB/s"]
    rows = []
    for store in plan.stores:
        hours, rate = store.teacher_hours, store.read_bytes_per_second
        rows.append(
            [
                store.form,
                f"{store.bytes_per_crop:,.2f}",
                words.gigabytes(store.stored_bytes),
                words.gigabytes(store.cache_bytes),
                "" if hours is None else f"{hours:,.1f}",
                "" if rate is None else f"{rate / 1e6:,.1f}",
            ]
        )
    return columns, rows


def plan_fields(plan: Plan) -> Table:
    """Bytes per crop of each array, one column per planned store."""
    names = list(dict.fromkeys(name for store in plan.stores for name in store.fields))
    rows = [
        [name, *(f"{s.fields[name]:,.2f}" if name in s.fields else "" for s in plan.stores)]
        for name in names
    ]
    return ["bytes per crop", *(store.form for store in plan.stores)], rows


def panels(reports: Sequence[StorageReport]) -> list[Panel]:
    """Plots of storage reports."""
    bars = sum(size.raw_bytes > 0 for r in reports for size in r.fields.values())
    return [
        Panel(
            "Bytes per crop by field",
            "Uncompressed, as stored, and with an ideal code (if known).",
            lambda axes: _fields(axes, reports),
            wide=True,
            height=1.2 + 0.6 * bars,
        ),
        Panel(
            "ImageNet-1K x 200 crops",
            "Table 2 of the FKD paper, and the stores at the same scale (logarithmic axis).",
            lambda axes: _paper(axes, reports),
            wide=True,
            height=1.0 + 0.3 * (len(reports[0].table) + len(reports)),
        ),
    ]


def _fields(axes: Axes, reports: Sequence[StorageReport]) -> None:
    bars = []
    for name, r in zip(names_of(reports), reports, strict=True):
        crops = max(r.images * r.crops_per_image, 1)
        for field, size in r.fields.items():
            if size.raw_bytes:
                label = field if len(reports) == 1 else f"{name}: {field}"
                bars.append((label, size.raw_bytes / crops, size.bytes_per_crop, size.bound))
    y_positions = np.arange(len(bars))
    for offset, column, name, colour in (
        (-0.27, 1, "uncompressed", "#b9c9e4"),
        (0.0, 2, "stored", COLOURS[0]),
        (0.27, 3, "ideal code", COLOURS[1]),
    ):
        values = [bar[column] for bar in bars]
        known = [k for k, value in enumerate(values) if value is not None]
        lengths = [float(values[k] or 0.0) for k in known]
        axes.barh(y_positions[known] + offset, lengths, 0.25, color=colour, label=name)
        for k, value in zip(known, lengths, strict=True):
            axes.text(
                value, float(y_positions[k]) + offset, f" {value:,.2f}", va="center", fontsize=8
            )
    axes.set_yticks(y_positions, [bar[0] for bar in bars], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("bytes per crop")
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _paper(axes: Axes, reports: Sequence[StorageReport]) -> None:
    bars = [(row.name, row.paper, "#b9c9e4") for row in reports[0].table]
    bars += [
        (f"{name} ({r.form or 'no labels'})", float(r.imagenet), COLOURS[0])
        for name, r in zip(names_of(reports), reports, strict=True)
        if r.finished
    ]
    y_positions = np.arange(len(bars))
    gigabytes = [size / 1e9 for _, size, _ in bars]
    axes.barh(y_positions, gigabytes, 0.7, color=[colour for *_, colour in bars])
    for y, (_, size, _), value in zip(y_positions, bars, gigabytes, strict=True):
        axes.text(value, float(y), f" {words.gigabytes(size)}", va="center", fontsize=8)
    axes.set_yticks(y_positions, [name for name, *_ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("gigabytes")


def plan_panels(plan: Plan) -> list[Panel]:
    """Plots of a plan: composition and size of each store."""
    height = 1.4 + 0.5 * len(plan.stores)
    return [
        Panel(
            "Bytes per crop by array",
            "The arrays of each planned store, stacked.",
            lambda axes: _plan_fields(axes, plan),
            wide=True,
            height=height,
        ),
        Panel(
            "Store and cache",
            "Size of the store, and of the local cache on each training node.",
            lambda axes: _plan_bytes(axes, plan),
            wide=True,
            height=height,
        ),
    ]


def _plan_fields(axes: Axes, plan: Plan) -> None:
    y_positions = np.arange(len(plan.stores))
    left = np.zeros(len(y_positions))
    for index, name in enumerate(dict.fromkeys(f for s in plan.stores for f in s.fields)):
        lengths = np.array([store.fields.get(name, 0.0) for store in plan.stores])
        axes.barh(
            y_positions, lengths, 0.6, left=left, color=COLOURS[index % len(COLOURS)], label=name
        )
        left += lengths
    _bars(axes, plan, zip(y_positions, left, strict=True), "bytes per crop")


def _plan_bytes(axes: Axes, plan: Plan) -> None:
    y_positions = np.arange(len(plan.stores))
    stored = np.array([store.stored_bytes / 1e9 for store in plan.stores])
    cache = np.array([store.cache_bytes / 1e9 for store in plan.stores])
    axes.barh(y_positions - 0.2, stored, 0.4, color=COLOURS[0], label="stored")
    axes.barh(y_positions + 0.2, cache, 0.4, color=COLOURS[1], label="cache")
    ends = [
        *zip(y_positions - 0.2, stored, strict=True),
        *zip(y_positions + 0.2, cache, strict=True),
    ]
    _bars(axes, plan, ends, "gigabytes")


def _bars(axes: Axes, plan: Plan, ends: Iterable[tuple[float, float]], unit: str) -> None:
    """Common elements of a plan's plots: forms, the value at the end of each bar, a legend."""
    for y, end in ends:
        axes.text(end, y, f" {end:,.2f}", va="center", fontsize=8)
    axes.set_yticks(np.arange(len(plan.stores)), [store.form for store in plan.stores])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(unit)
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=6)


def report_page(reports: Sequence[StorageReport]) -> str:
    """Storage reports as a page."""
    sections = [Section(table=store_table(reports), panels=panels(reports))]
    for name, r in zip(names_of(reports), reports, strict=True):
        sections.append(Section(f"{name}: fields", table=field_table(r)))
    beside = paper_rows(reports[0]) if len(reports) == 1 else paper_side_by_side(reports)
    heading = "ImageNet-1K x 200 crops, compared with Table 2 of the FKD paper"
    sections.append(Section(heading, table=beside))
    sections += [Section(text=say(reports)) for say in (unfinished_words, other_classes)]
    return sections_page("Storage", ENTROPY_WORDS, sections)


def plan_page(plan: Plan) -> str:
    """A plan as a page."""
    w = plan.wanted
    lead = f"{w.images:,} images x {w.crops} crops, {w.classes:,} classes. {PLAN_WORDS}"
    sections = [
        Section(table=plan_table(plan), panels=plan_panels(plan)),
        Section("Fields", table=plan_fields(plan)),
    ]
    return sections_page("Plan of a store", lead, sections)


def unfinished_words(reports: Sequence[StorageReport]) -> str:
    """A note on unfinished stores, whose size at ImageNet's scale is not known yet."""
    notes = [
        f"{name} has {sum(x.units_done for x in r.sources) or 'none'} of its "
        f"{sum(x.units for x in r.sources)} units"
        for name, r in zip(names_of(reports), reports, strict=True)
        if not r.finished
    ]
    later = "sizes at ImageNet's scale are reported for finished stores."
    return f"Not finished: {', '.join(notes)}; {later}" if notes else ""


def other_classes(reports: Sequence[StorageReport]) -> str:
    """A note on stores whose number of classes differs from the paper's; `full` depends on it."""
    others = [
        f"{name} has {r.classes:,}"
        for name, r in zip(names_of(reports), reports, strict=True)
        if r.classes not in (0, 1000)
    ]
    return f"The paper's table is for 1,000 classes; {', '.join(others)}." if others else ""


ENTROPY_WORDS = (
    "Entropy: bytes per crop of an ideal code. Boxes and flips: the crop distribution; ids: an "
    "adaptive code over the image's earlier crops; others: value frequencies (Miller-Madow)."
)
PLAN_WORDS = "Sizes of kept classes are from simulated labels; a teacher's may differ by 30 %."
