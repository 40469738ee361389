"""The methods: what a student is asked to imitate, one file each.

A method file has a frozen dataclass `Settings`, `needs(settings)` and `build(settings, context)`.
Adding one touches its file, the table below, its test and its row in docs/methods.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from fkdpipe.common import config
from fkdpipe.common.config import Setting, SettingsError
from fkdpipe.train.methods import dpk, fitnet, fkd, kd, kdep, meal, scalekd, selfsup, srd
from fkdpipe.train.methods.interface import Context, Method, MethodNeeds


class MethodFile(Protocol):
    """What a method's module offers."""

    @property
    def Settings(self) -> Any: ...
    @property
    def needs(self) -> Any: ...
    @property
    def build(self) -> Any: ...


METHODS: dict[str, MethodFile] = {
    "dpk": dpk,
    "fitnet": fitnet,
    "fkd": fkd,
    "kd": kd,
    "kdep": kdep,
    "meal": meal,
    "scalekd": scalekd,
    "selfsup": selfsup,
    "srd": srd,
}


def needs(table: Mapping[str, Any]) -> MethodNeeds:
    """What the method of a recipe's [method] table asks for.

    Raises:
        UsageError: unknown method or settings, all listed.
    """
    return _file(table).needs(parse(table))


def build(table: Mapping[str, Any], context: Context) -> Method:
    """The method of a recipe's [method] table.

    Raises:
        UsageError: unknown method or settings, or networks it cannot pair.
    """
    return _file(table).build(parse(table), context)


def parse(table: Mapping[str, Any]) -> Any:
    """The settings dataclass of a [method] table, checked."""
    file = _file(table)
    rest = {key: value for key, value in table.items() if key != "name"}
    return config.build(file.Settings, rest, where="", prefix="method.")


def describe(table: Mapping[str, Any]) -> list[Setting]:
    """The settings of a recipe's [method] table, its name first."""
    allowed = f"one of {', '.join(METHODS)}"
    name = Setting("method.name", allowed, "fkd", False, "The distillation method.")
    return [name, *config.describe(_file(table).Settings, "method.")]


def digests(table: Mapping[str, Any]) -> dict[str, str]:
    """Setting to SHA-256, of the files that a method's settings name."""
    settings = parse(table)
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {
        name: hashlib.sha256(value.read_bytes()).hexdigest()
        for name, value in given.items()
        if isinstance(value, Path)
    }


def _file(table: Mapping[str, Any]) -> MethodFile:
    name = table.get("name", "fkd")
    if str(name) not in METHODS:
        raise SettingsError([f"method.name must be one of {', '.join(METHODS)}; found {name!r}"])
    return METHODS[name]
