"""Output: progress and logs on stderr, results on stdout."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fkdpipe.common.errors import FkdpipeError, UsageError


def start_logging() -> None:
    """Print fkdpipe's log messages to stderr as plain text."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("fkdpipe")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


def reporter() -> Any:
    """Progress bars in a terminal, otherwise a line every few seconds."""
    from fkdpipe.commands import bars

    start_logging()
    return bars.Bars() if sys.stderr.isatty() else bars.Lines()


def print_json(value: Any) -> None:
    click.echo(json.dumps(value))


def check_file(out: Path, kinds: tuple[str, ...]) -> None:
    """Check that an output file can be written, before the work that produces it starts.

    Raises:
        UsageError: another extension, an existing folder, or a file in a folder that is missing.
    """
    if out.suffix not in kinds:
        raise UsageError(f"{out}: the file name must end in {' or '.join(kinds)}.")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: folder {out.parent} does not exist.")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; choose a file name.")


def write_file(out: Path, data: bytes) -> None:
    """Write a file. Raises FkdpipeError if it cannot be written."""
    try:
        out.write_bytes(data)
    except OSError as error:
        raise FkdpipeError(f"{out} cannot be written: {error.strerror}.") from error


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout: text in the first column, numbers in the others."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if title:
        click.echo(title)  # rich would wrap it at the table's width
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 80
    cells = [[_printable(text) for text in row] for row in (columns, *rows)]
    for chosen in _fitting(cells, console.width):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index in chosen:
            side: Any = "right" if index else "left"
            table.add_column(cells[0][index], justify=side, overflow="fold", no_wrap=index > 0)
        for row in cells[1:]:
            table.add_row(*(row[index] for index in chosen))
        console.print(table)


def _fitting(cells: list[list[str]], width: int) -> list[list[int]]:
    """Column indices of each table, if one table is too wide. Each repeats the first column."""
    from rich.cells import cell_len

    wide = [max(map(cell_len, column)) + 3 for column in zip(*cells, strict=True)]
    room = max(width + 1 - wide[0], width // 2)
    tables: list[list[int]] = [[0]]
    for index in range(1, len(wide)):
        if len(tables[-1]) > 1 and sum(wide[k] for k in tables[-1][1:]) + wide[index] > room:
            tables.append([0])
        tables[-1].append(index)
    return tables


def _printable(text: str) -> str:
    """Names of files and classes may contain terminal control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
