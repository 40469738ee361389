"""TOML and command-line settings to frozen dataclasses, and back.

Every unknown key and every bad value is reported at once, with the place it was written. Values
must have the type of their field; `int` is taken where `float` is meant, nothing else is guessed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from fkdpipe.common.errors import UsageError

T = TypeVar("T")


def load_toml(file: Path) -> dict[str, Any]:
    """Raises UsageError when the file is missing or not TOML."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such recipe: {file}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file} is not readable as TOML: {error}.") from error


def parse_assignment(text: str) -> dict[str, Any]:
    """`optimizer.lr=0.1` as nested tables; the value is TOML, or a bare word taken as text.

    Raises:
        UsageError: no "=" in it.
    """
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UsageError(f"--set takes KEY=VALUE, for example optimizer.lr=0.1; found {text!r}.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    for key in reversed(path.split(".")):
        parsed = {key: parsed}
    return parsed


def merge(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables, later ones winning key by key."""
    merged: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            old = merged.get(key)
            both = isinstance(value, Mapping) and isinstance(old, Mapping)
            merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def build(cls: type[T], table: Mapping[str, Any], *, where: str = "settings") -> T:
    """A dataclass from a table.

    Args:
        where: named in the message, for example the recipe's path.

    Raises:
        UsageError: listing every problem.
    """
    problems: list[str] = []
    made = _build(cls, table, "", problems)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise UsageError(f"{where}: {count}:\n  " + "\n  ".join(problems))
    return made


def to_table(settings: Any) -> dict[str, Any]:
    """A dataclass as plain tables, lists and values; what a run folder and a store record."""
    return {
        field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _build(cls: type[T], table: Mapping[str, Any], prefix: str, problems: list[str]) -> T:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    before = len(problems)
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(fields)}"
            problems.append(f"{prefix}{key} is not a setting{hint}")
            continue
        values[key] = _convert(hints[key], value, f"{prefix}{key}", problems)
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in table:
            problems.append(f"{prefix}{name} is required")
    if len(problems) > before:
        return None  # type: ignore[return-value]  # the caller raises
    try:
        return cls(**values)
    except UsageError as error:
        problems.append(f"{prefix.rstrip('.')}: {error}" if prefix else str(error))
        return None  # type: ignore[return-value]


def _convert(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return _build(typing.cast(type, hint), value, f"{name}.", problems)
        problems.append(f"{name} must be a table, found {value!r}")
        return None
    origin, args = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [arg for arg in args if arg is not type(None)]
        if len(inner) == 1:
            return _convert(inner[0], value, name, problems)
        for arg in inner:
            attempt: list[str] = []
            converted = _convert(arg, value, name, attempt)
            if not attempt:
                return converted
        problems.append(f"{name} has no meaning as {value!r}")
        return None
    if origin is Literal:
        if value not in args:
            allowed = ", ".join(str(arg) for arg in args)
            problems.append(f"{name} must be one of {allowed}; found {value!r}")
        return value
    if origin is tuple:
        return _convert_tuple(args, value, name, problems)
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f"{name} must be a table, found {value!r}")
        return dict(value) if isinstance(value, Mapping) else None
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{name} must be a finite number, found {value!r}")
        return None
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    problems.append(f"{name} must be {_word(hint)}, found {value!r}")
    return None


def _convert_tuple(args: tuple, value: Any, name: str, problems: list[str]) -> tuple | None:
    if not isinstance(value, (list, tuple)):
        problems.append(f"{name} must be a list, found {value!r}")
        return None
    variadic = len(args) == 2 and args[1] is Ellipsis
    hints = [args[0]] * len(value) if variadic else list(args)
    if len(hints) != len(value):
        problems.append(f"{name} must have {len(hints)} values, found {len(value)}")
        return None
    return tuple(
        _convert(hint, item, f"{name}[{k}]", problems)
        for k, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _word(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
        hint, str(hint)
    )
