"""Distillation methods, one file each.

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
    """Interface of a method's module."""

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
    """Requirements of the method of a recipe's [method] table.

    Raises:
        UsageError: unknown method or settings, all listed.
    """
    return _file(table).needs(parse(table))


def build(table: Mapping[str, Any], context: Context) -> Method:
    """Build the method of a recipe's [method] table.

    Raises:
        UsageError: unknown method or settings, or networks it cannot combine.
    """
    return _file(table).build(parse(table), context)


def parse(table: Mapping[str, Any]) -> Any:
    """The validated settings dataclass of a [method] table."""
    file = _file(table)
    rest = {key: value for key, value in table.items() if key != "name"}
    return config.build(file.Settings, rest, where="", prefix="method.")


def describe(table: Mapping[str, Any]) -> list[Setting]:
    """Descriptions of the settings of a [method] table, its name first."""
    allowed = f"one of {', '.join(METHODS)}"
    name = Setting("method.name", allowed, "fkd", False, "The distillation method.")
    return [name, *config.describe(_file(table).Settings, "method.")]


def digests(table: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each file in a method's settings, by setting."""
    settings = parse(table)
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {
        name: hashlib.sha256(value.read_bytes()).hexdigest()
        for name, value in values.items()
        if isinstance(value, Path)
    }


def _file(table: Mapping[str, Any]) -> MethodFile:
    name = table.get("name", "fkd")
    if str(name) not in METHODS:
        raise SettingsError([f"method.name must be one of {', '.join(METHODS)}; found {name!r}"])
    return METHODS[name]
