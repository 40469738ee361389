"""What every benchmark shares: the machine's facts, the result file, the last line."""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """A plain name of this machine: its cores, or its GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"{len(os.sched_getaffinity(0))}core-cpu"


def facts() -> dict[str, str]:
    return {
        "machine": machine(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(rows[0])
    cells = [names, *([_text(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else (
        f"{value:.0f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


def finish(name: str, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Print the table, keep it as results/<name>-<machine>.csv, print the last line."""
    print_table(rows)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}-{machine()}.csv", "w", newline="") as file:
        for key, value in facts().items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(json.dumps(dict(summary)))


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over interleaved rounds of ours / theirs."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)
