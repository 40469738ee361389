"""Shared by all benchmarks: machine specification, tables, result files and the last line.

A benchmark is `python benchmarks/<name>.py [--quick]`. It prints a table, saves it as
`benchmarks/results/<name>-<machine>.csv`, and prints one JSON object with its figures as the last
line. Ratios are named `<what>_vs_<baseline>`; larger is better. A `--quick` run only tests the
script and saves no results.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Row = Mapping[str, Any]


def arguments(
    description: str | None, add: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """Parse the command line of a benchmark; `add` adds its own options."""
    first = (description or "").strip().splitlines()[0]
    parser = argparse.ArgumentParser(description=first)
    parser.add_argument("--quick", action="store_true", help="Run a small trial, save no results.")
    add(parser)
    return parser.parse_args()


@cache
def cores() -> int:
    """Number of CPU cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def machine() -> str:
    """A short name of the machine: "2core-cpu", "16core-h200"."""
    return f"{cores()}core-{_gpu() or 'cpu'}"


def facts() -> dict[str, Any]:
    """Context of the results: cores, memory, GPU, versions, date."""
    import torch

    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": machine(),
        "cores": cores(),
        "memory_gb": round(memory_bytes / 1e9),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def peak_bytes() -> int:
    """Peak resident set of this process, in bytes; see `reset_peak`."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Current memory of this process without mapped files, which can be dropped at any time."""
    return _status("RssAnon")


def reset_peak() -> None:
    """Restart the measurement of `peak_bytes`."""
    Path("/proc/self/clear_refs").write_text("5")


def interleaved(rounds: int, **measures: Callable[[], float]) -> dict[str, list[float]]:
    """Run the measures in turns, so that other load affects all alike; one value per round."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over rounds of the ratio in each round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def finish(name: str, rows: Sequence[Row], figures: Mapping[str, Any], *, quick: bool) -> None:
    """Print the table, save it with the machine specification, and print the last line."""
    known = facts()
    table(rows)
    print(", ".join(f"{key} {value}" for key, value in known.items() if value != ""))
    if not quick:
        keep(name, rows, known, figures)
    print(json.dumps(dict(figures)))


def table(rows: Sequence[Row]) -> None:
    """Print rows as a table, with text in the first column. Rows may lack columns."""
    columns = _columns(rows)
    cells = [columns, *([_text(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    for line in cells:
        first, *others = line
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *right]).rstrip())


def keep(
    name: str, rows: Sequence[Row], known: Mapping[str, Any], figures: Mapping[str, Any]
) -> None:
    """Write results/<name>-<machine>.csv: comments with machine and figures, then the rows."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}-{machine()}.csv", "w", newline="") as file:
        for key, value in known.items():
            file.write(f"# {key}: {value}\n")
        file.write(f"# figures: {json.dumps(dict(figures))}\n")
        writer = csv.DictWriter(file, _columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def _gpu() -> str:
    """Short name of the GPU ("h200" for "NVIDIA H200"), or an empty string."""
    import torch

    if not torch.cuda.is_available():
        return ""
    words = torch.cuda.get_device_name(0).lower().replace("nvidia", "").split()
    return words[0] if words else "gpu"


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
