"""The methods: what a student is asked to imitate, one file each.

A method file has a frozen settings dataclass, and a `build(settings, context)` that returns a
`Method`. Adding one touches its file, the table below, its test and its row in docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fkdpipe import config
from fkdpipe.errors import UsageError
from fkdpipe.train.methods import fkd
from fkdpipe.train.methods.interface import Context, Method

# name: (settings dataclass, builder)
METHODS = {
    "fkd": (fkd.Settings, fkd.build),
}


def build(table: Mapping[str, Any], context: Context) -> Method:
    """The method of a recipe's [method] table.

    Raises:
        UsageError: unknown method or settings, all listed.
    """
    settings = parse(table)
    _, builder = METHODS[str(table["name"])]
    return builder(settings, context)


def parse(table: Mapping[str, Any]) -> Any:
    """The settings dataclass of a [method] table, checked."""
    name = table.get("name", "fkd")
    if name not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}; found {name!r}.")
    rest = {key: value for key, value in table.items() if key != "name"}
    return config.build(METHODS[name][0], rest, where=f"method {name}")
