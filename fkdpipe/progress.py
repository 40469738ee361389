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


class _Silent:
    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator[Advance]:
        yield lambda count: None


silent: Reporter = _Silent()
