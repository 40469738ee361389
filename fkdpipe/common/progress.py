"""How long-running library functions tell what they do, without printing.

They take a `Reporter`; the command line passes one that draws bars on stderr, tests and other
callers pass none and get `silent`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

Advance = Callable[[int], None]


class Reporter(Protocol):
    def task(
        self, name: str, total: int, unit: str, *, done: int = 0
    ) -> AbstractContextManager[Advance]:
        """A piece of work of `total` units; call the result with how many more are done.

        Args:
            done: units an earlier run did; no part of the rate or of the time left.
        """


def shared(advance: Advance, parts: int) -> Advance:
    """Counts what is done once for each of several parts, told when it is done for all."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        before, done = done // parts, done + count
        advance(done // parts - before)

    return add


class _Silent:
    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator[Advance]:
        yield lambda count: None


silent: Reporter = _Silent()
