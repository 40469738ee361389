"""A run's record: one JSON object per line, nothing needed to read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to `metrics.jsonl`; what a stopped run wrote beyond its checkpoint is cut off."""

    def __init__(self, file: Path, *, resume_step: int) -> None:
        kept = [line for line in read(file) if line["step"] <= resume_step] if file.exists() else []
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = file

    def write(self, line: dict[str, Any]) -> None:
        """Every line has `step` (optimiser steps done) and `kind` ("train" or "eval")."""
        with open(self._file, "a") as file:
            file.write(json.dumps(line) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a last line cut off by a kill is left out."""
    lines = []
    for text in file.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
