"""Progress and logs on stderr, results on stdout."""

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
    """fkdpipe's own messages, plain, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("fkdpipe")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


def reporter() -> Any:
    """Bars with rate and time left at a terminal, now and then a line elsewhere."""
    from fkdpipe.commands import bars

    start_logging()
    return bars.Bars() if sys.stderr.isatty() else bars.Lines()


def print_json(value: Any) -> None:
    click.echo(json.dumps(value))


def check_file(out: Path, kinds: tuple[str, ...]) -> None:
    """Refuse a file to write before hours are spent on what goes into it.

    Raises:
        UsageError: another kind of file, a folder, or one in no folder.
    """
    if out.suffix not in kinds:
        raise UsageError(f"{out}: write {' or '.join(f'FILE{kind}' for kind in kinds)}.")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: there is no folder {out.parent}.")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name a file.")


def write_file(out: Path, data: bytes) -> None:
    """Raises FkdpipeError when the file cannot be written."""
    try:
        out.write_bytes(data)
    except OSError as error:
        raise FkdpipeError(f"{out} cannot be written: {error.strerror}.") from error


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is text, the others are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if title:
        click.echo(title)  # rich would break it at the table's width
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
    """Columns of each table, where one for all would break numbers or names: the first column
    stands in each, and the others are shared out evenly."""
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
    """Names of files and classes may hold anything, also what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
