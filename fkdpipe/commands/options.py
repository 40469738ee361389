"""Options that several commands share, and how flags become settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fkdpipe.common.errors import UsageError

if TYPE_CHECKING:
    from fkdpipe.networks.models import ModelSpec

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
device_option = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
cache_option = click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Local folder for the label cache.  [default: temporary space]",
)


def recipe_options(command: Callable) -> Callable:
    """--recipe FILE and --set KEY=VALUE."""
    command = click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any setting of a recipe, for example optimizer.weight_decay=1e-4.",
    )(command)
    return click.option("--recipe", type=click.Path(path_type=Path), help="TOML file of settings.")(
        command
    )


def resolve(
    cls: type, recipe: Path | None, assignments: tuple[str, ...], flags: dict[str, Any]
) -> Any:
    """Settings from flag or --set, then recipe, then default.

    Raises:
        UsageError: listing every problem; or a setting has a flag and a --set.
    """
    from fkdpipe.common import config

    where = str(recipe) if recipe else "settings"
    return config.build(cls, given_table(recipe, assignments, flags), where=where)


def given_table(
    recipe: Path | None, assignments: tuple[str, ...], flags: dict[str, Any]
) -> dict[str, Any]:
    """What the user gave, as one table.

    Raises:
        UsageError: a setting has a flag and a --set.
    """
    from fkdpipe.common import config

    assigned = [config.parse_assignment(text) for text in assignments]
    given = {key: value for key, value in flags.items() if value not in (None, (), "")}
    for key in sorted(given.keys() & {key for table in assigned for key in _keys(table)}):
        raise UsageError(f"{key} is given twice, by a flag and by --set; leave one of them out.")
    recipes = [config.load_toml(recipe)] if recipe else []
    return config.merge(*recipes, *assigned, _nested(given))


def _keys(table: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of all values in nested tables."""
    keys = set()
    for name, value in table.items():
        inner = isinstance(value, dict)
        keys |= _keys(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}"}
    return keys


def _nested(flags: dict[str, Any]) -> dict[str, Any]:
    """`optimizer.lr` as a key becomes a table."""
    table: dict[str, Any] = {}
    for name, value in flags.items():
        *path, last = name.split(".")
        inner = table
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = list(value) if isinstance(value, tuple) else value
    return table


def networks(typed: Sequence[str], settings: Sequence[str]) -> list[ModelSpec]:
    """The networks of a setting; only what the user typed as the flag itself may name Python code.

    Args:
        typed: the flag's values, empty when it was left out. settings: from wherever they came.
    """
    from fkdpipe.networks.models import parse_spec

    return [parse_spec(text, allow_python=text in typed) for text in settings]


def choose_device(text: str, local_rank: int = 0) -> Any:
    from fkdpipe.common import distributed

    return distributed.choose_device(text, local_rank)


def finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Refuse nan and infinity, which Python takes for numbers."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number.")
    return value


def cache_dir(given: Path | None) -> Path:
    from fkdpipe.storage import cache

    return given or cache.default_cache_dir()
