"""Progress on stderr: bars in a terminal, otherwise a line every few seconds; rich counts."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Bars:
    @contextlib.contextmanager
    def task(
        self, name: str, total: int, unit: str, *, done: int = 0
    ) -> Iterator[Callable[[int], None]]:
        console = Console(file=sys.stderr)
        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(_noun(total, unit)),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
        log = logging.getLogger("fkdpipe")
        before, log.handlers[:] = list(log.handlers), [handler]
        try:
            with _progress(*columns, console=console, refresh_per_second=4) as progress:
                task = _add(progress, name, total, unit, done)
                yield lambda count: progress.advance(task.id, count)
        finally:
            log.handlers[:] = before


class Lines:
    EVERY = 10.0  # seconds

    @contextlib.contextmanager
    def task(
        self, name: str, total: int, unit: str, *, done: int = 0
    ) -> Iterator[Callable[[int], None]]:
        progress = _progress(disable=True)
        task = _add(progress, name, total, unit, done)
        last = time.monotonic()

        def status() -> str:
            of = f"/{total:,}" if total else ""
            return (
                f"{name}: {int(task.completed):,}{of} {_noun(total or int(task.completed), unit)}"
            )

        def advance(count: int) -> None:
            nonlocal last
            progress.advance(task.id, count)
            now = time.monotonic()
            if now - last >= self.EVERY:
                last = now
                left = task.time_remaining
                ending = "" if left is None else f", {timedelta(seconds=round(left))} left"
                click.echo(f"{status()}, {_rate(task)}{ending}", err=True)

        yield advance
        click.echo(f"{status()} in {timedelta(seconds=round(task.elapsed or 0))}", err=True)


def _progress(*columns: ProgressColumn, **options: Any) -> Progress:
    # By default rich only averages over the last 30 seconds, and a unit may take longer.
    period = float("inf")
    return Progress(*columns, speed_estimate_period=period, get_time=time.monotonic, **options)


def _add(progress: Progress, name: str, total: int, unit: str, done: int) -> Task:
    number = progress.add_task(name, total=total or None, completed=done, unit=unit)
    progress.advance(number, 0)  # rich measures the speed from the first advance
    return progress.tasks[-1]


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task))


def _rate(task: Task) -> str:
    """Units per second, or seconds per unit for slow tasks."""
    speed = task.finished_speed or task.speed or 0.0
    unit = task.fields["unit"]
    if 0 < speed < 0.95:
        return f"{1 / speed:,.1f} s/{_noun(1, unit)}"
    return f"{speed:,.0f} {unit}/s"


def _noun(count: int, unit: str) -> str:
    return unit.removesuffix("s") if count == 1 else unit
