"""Options shared by several commands, and the conversion of flags to settings."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fkdpipe.common.errors import UsageError

if TYPE_CHECKING:
    from fkdpipe.common.config import Setting
    from fkdpipe.networks.models import ModelSpec

SHOW = "fkdpipe.show_settings"  # key in the context's meta

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object to stdout."
)
device_option = click.option("--device", default="auto", help="Device: auto, cpu, cuda or cuda:N.")
numbered_option = click.option(
    "--numbered", is_flag=True, help="Class folders are named by class index, as in ImageNet-V2."
)
cache_option = click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Local folder for the label cache.  [default: temporary space]",
)


class WithSettings(click.Command):
    """A command with `recipe_options`. With --show-settings, its arguments are optional."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if "--show-settings" not in args:
            return super().parse_args(context, args)
        relaxed = click.Command(self.name, params=[copy.copy(each) for each in self.params])
        for each in relaxed.params:
            each.required = False
        return relaxed.parse_args(context, args)


def recipe_options(command: Callable) -> Callable:
    """Add --recipe FILE, --set KEY=VALUE and --show-settings to a command of class WithSettings."""
    command = click.option(
        "--show-settings",
        is_flag=True,
        expose_value=False,
        callback=lambda context, _, value: context.meta.update({SHOW: value}),
        help="Print each setting with its allowed values, default and meaning, and exit.",
    )(command)
    command = click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Setting by name, for example optimizer.weight_decay=1e-4; repeat for several.",
    )(command)
    return click.option("--recipe", type=click.Path(path_type=Path), help="TOML file of settings.")(
        command
    )


def resolve(
    cls: type,
    recipe: Path | None,
    assignments: tuple[str, ...],
    flags: dict[str, Any],
    *,
    describe: Callable[[dict[str, Any]], list[Setting]] | None = None,
) -> Any:
    """Settings from flags and --set, then the recipe, then defaults. --show-settings prints them.

    Args:
        describe: maps the table of settings to the list of all settings; by default those of `cls`.

    Raises:
        UsageError: lists every problem; or a setting is given by a flag and by --set.
        Exit: after --show-settings has printed them.
    """
    from fkdpipe.common import config

    table = given_table(recipe, assignments, flags)
    where = str(recipe) if recipe else "settings"
    context = click.get_current_context()
    if not context.meta[SHOW]:
        return config.build(cls, table, where=where)
    config.check(cls, table, where=where)
    described = describe(table) if describe else config.describe(cls)
    _show(described, table, as_json=context.params["as_json"])
    return context.exit()


def _show(described: list[Setting], table: dict[str, Any], *, as_json: bool) -> None:
    """Print every setting with the user's value or the default."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from fkdpipe.commands import terminal

    values = [_value(table, each) for each in described]
    if as_json:
        rows = [
            asdict(each) | {"value": value} for each, value in zip(described, values, strict=True)
        ]
        terminal.print_json({"settings": rows})
        return
    listing = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    listing.add_column("setting", overflow="fold", max_width=26)
    listing.add_column("value", overflow="fold", max_width=18)
    listing.add_column("meaning")
    for each, value in zip(described, values, strict=True):
        default = "required" if each.required else _as_text(each.default)
        current = default if value == each.default else f"{_as_text(value)}\n({default})"
        allowed = f"{each.allowed[0].upper()}{each.allowed[1:]}."
        listing.add_row(each.name, current, f"{each.meaning} {allowed}")
    width = None if sys.stdout.isatty() else 80
    Console(highlight=False, markup=False, emoji=False, width=width).print(listing)
    click.echo("In parentheses: the default, if the value differs from it.")


def _value(table: dict[str, Any], setting: Setting) -> Any:
    """The user's value, or the default."""
    value: Any = table
    for key in setting.name.split("."):
        if not isinstance(value, dict) or key not in value:
            return setting.default
        value = value[key]
    return str(value) if isinstance(value, Path) else value


def _as_text(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_as_text, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def given_table(
    recipe: Path | None, assignments: tuple[str, ...], flags: dict[str, Any]
) -> dict[str, Any]:
    """Recipe, --set and flags merged into one table.

    Raises:
        UsageError: a setting is given by a flag and by --set.
    """
    from fkdpipe.common import config

    assigned = [config.parse_assignment(text) for text in assignments]
    absent = (None, (), "")
    values = {k: v for k, v in flags.items() if v not in absent and v is not False}
    for key in sorted(values.keys() & {key for table in assigned for key in _keys(table)}):
        raise UsageError(f"{key} is given twice, by a flag and by --set; remove one of them.")
    recipes = [config.load_toml(recipe)] if recipe else []
    return config.merge(*recipes, *assigned, _nested(values))


def _keys(table: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of all values in nested tables."""
    keys = set()
    for name, value in table.items():
        inner = isinstance(value, dict)
        keys |= _keys(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}"}
    return keys


def _nested(flags: dict[str, Any]) -> dict[str, Any]:
    """Turn dotted keys such as `optimizer.lr` into nested tables."""
    table: dict[str, Any] = {}
    for name, value in flags.items():
        *path, last = name.split(".")
        inner = table
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = list(value) if isinstance(value, tuple) else value
    return table


def networks(typed: Sequence[str], settings: Sequence[str]) -> list[ModelSpec]:
    """Parse the networks of a setting. Only values of the flag itself may name Python code.

    Args:
        typed: values of the flag; empty if it was not given.
        settings: values after flags, recipe and defaults are merged.
    """
    from fkdpipe.networks.models import parse_spec

    return [parse_spec(text, allow_python=text in typed) for text in settings]


def choose_device(text: str, local_rank: int = 0) -> Any:
    from fkdpipe.common import distributed

    return distributed.choose_device(text, local_rank)


def finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Reject nan and infinity, which Python parses as floats."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


def cache_dir(folder: Path | None) -> Path:
    from fkdpipe.storage import cache

    return folder or cache.default_cache_dir()
