"""Progress reports of long-running library functions, which never print, and what an interrupted
one has kept.

They take a `Reporter`. The command line passes one that draws progress bars on stderr; the default
is `silent`.
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
        """Start a task of `total` items; call the result with the number of newly finished items.

        Args:
            name: name of the task.
            unit: plural noun for the items, such as "images".
            done: items finished by an earlier run; they do not count for the rate.
        """


@contextlib.contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Give a KeyboardInterrupt of this block the message that the command line prints.

    Args:
        kept: what is kept of the work, and how to go on. Called after the interrupt. Of nested
            blocks, the outermost decides.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(kept()) from error


def shared(advance: Advance, parts: int) -> Advance:
    """Report an item to `advance` once it is finished for all of several parts."""
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
