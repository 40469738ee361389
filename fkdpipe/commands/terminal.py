"""Progress and logs on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
    start_logging()
    return _Bars() if sys.stderr.isatty() else _Lines()


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


class _Bars:
    @contextlib.contextmanager
    def task(
        self, name: str, total: int, unit: str, *, done: int = 0
    ) -> Iterator[Callable[[int], None]]:
        from rich.console import Console
        from rich.logging import RichHandler
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(file=sys.stderr)
        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(_noun(total, unit)),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
        log = logging.getLogger("fkdpipe")
        before, log.handlers[:] = list(log.handlers), [handler]
        try:
            with Progress(*columns, console=console, refresh_per_second=4) as progress:
                bar = progress.add_task(name, total=total or None, completed=done, rate="")
                rate = _Rate(unit)

                def advance(count: int) -> None:
                    progress.update(bar, advance=count, rate=rate.add(count))

                yield advance
        finally:
            log.handlers[:] = before


class _Lines:
    EVERY = 10.0  # seconds

    @contextlib.contextmanager
    def task(
        self, name: str, total: int, unit: str, *, done: int = 0
    ) -> Iterator[Callable[[int], None]]:
        begun = last = time.monotonic()
        earlier = done
        rate = _Rate(unit)

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            speed = rate.add(count)
            now = time.monotonic()
            if now - last >= self.EVERY:
                last = now
                left = ""
                if total and done > earlier:
                    seconds = (now - begun) / (done - earlier) * max(total - done, 0)
                    left = f", {_duration(seconds)} left"
                told = f"{name}: {done:,}{_of(total)} {_noun(total or done, unit)}"
                click.echo(f"{told}, {speed}{left}", err=True)

        yield advance
        seconds = time.monotonic() - begun
        told = f"{name}: {done:,}{_of(total)} {_noun(total or done, unit)}"
        click.echo(f"{told} in {_duration(seconds)}", err=True)


class _Rate:
    """Units per second over the last few seconds."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._points: list[tuple[float, int]] = [(time.monotonic(), 0)]

    def add(self, count: int) -> str:
        now = time.monotonic()
        self._points.append((now, self._points[-1][1] + count))
        while len(self._points) > 2 and now - self._points[0][0] > 10:
            self._points.pop(0)
        (t0, n0), (t1, n1) = self._points[0], self._points[-1]
        rate = (n1 - n0) / max(t1 - t0, 1e-3)
        if 0 < rate < 0.95:
            return f"{1 / rate:,.1f} s/{_noun(1, self._unit)}"
        return f"{rate:,.0f} {self._unit}/s"


def readable_time(seconds: float) -> str:
    """In seconds, minutes or hours, whichever leaves few digits."""
    for scale, unit in ((1, "seconds"), (60, "minutes")):
        if seconds < 99.95 * scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds / 3600:,.1f} hours"


def _noun(count: int, unit: str) -> str:
    return unit.removesuffix("s") if count == 1 else unit


def _of(total: int) -> str:
    return f"/{total:,}" if total else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
