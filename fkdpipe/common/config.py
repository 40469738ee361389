"""Settings: frozen dataclasses validated by pydantic, from TOML, `--set` or Python.

All problems are reported together, each with the dotted name used by `--set`, the allowed values
and the value found. Values must have the type of their field. An `int` is accepted for a `float`;
there are no other conversions.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fkdpipe.common.errors import UsageError

T = TypeVar("T")
Schema = dict[str, Any]  # JSON Schema, as pydantic writes it

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]

_STRICT = ConfigDict(
    strict=True,
    extra="forbid",
    allow_inf_nan=False,
    validate_default=True,  # cross-checks apply to defaults too
    use_attribute_docstrings=True,
)


class SettingsError(UsageError):
    """Invalid settings. `problems` has a line for each, starting with the name of the setting."""

    def __init__(self, problems: Sequence[str], where: str = "") -> None:
        self.problems = tuple(problems)
        many = len(problems) > 1
        stop = "" if problems[0].endswith("?") else "."
        lines = "".join(f"\n  {each}" for each in problems) if many else f" {problems[0]}{stop}"
        count = f" {len(problems)} problems:" if many else ""
        super().__init__(f"{where and f'{where}:'}{count}{lines}".strip(), code="settings")


@dataclass_transform(frozen_default=True, field_specifiers=(Field, dataclasses.field))
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that is validated on creation, also by `replace`.

    The docstring below a field describes it. To check one field against another, use a
    `field_validator` on the later one; `info.data` holds the earlier one if it is valid.

    Raises (when the class is instantiated):
        SettingsError: lists every problem.
    """
    checked: Any = pydantic.dataclasses.dataclass(cls, frozen=True, config=_STRICT)
    init = checked.__init__

    @functools.wraps(init)
    def validate(self: Any, *args: Any, **values: Any) -> None:
        try:
            init(self, *args, **values)
        except ValidationError as error:
            raise SettingsError(_problems(checked, error)) from None

    checked.__init__ = validate
    return checked


def load_toml(file: Path) -> dict[str, Any]:
    """Load a TOML file. Raises UsageError if it is missing or not valid TOML."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such recipe: {file}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file} cannot be read as TOML: {error}.") from error


def parse_assignment(text: str) -> dict[str, Any]:
    """Parse `optimizer.lr=0.1` into nested tables. A value that is not valid TOML is text.

    Raises:
        UsageError: `text` has no key or no "=".
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
    """Merge nested tables key by key; later tables take precedence."""
    merged: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            old = merged.get(key)
            both = isinstance(value, Mapping) and isinstance(old, Mapping)
            merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def build(
    cls: type[T], table: Mapping[str, Any], *, where: str = "settings", prefix: str = ""
) -> T:
    """Create settings from a table.

    Args:
        where: origin of the table for error messages, for example the path of the recipe.
        prefix: prefix of the names in error messages if the table is nested, such as `method.`.

    Raises:
        SettingsError: lists every problem.
    """
    try:
        return _validate(cls, table)
    except ValidationError as error:
        raise SettingsError(_problems(cls, error, prefix), where) from None


def check(cls: type, table: Mapping[str, Any], *, where: str = "settings") -> None:
    """Validate a table as `build` does, but allow required settings to be missing.

    Raises:
        SettingsError: lists every other problem.
    """
    try:
        _validate(cls, table)
    except ValidationError as error:
        if problems := _problems(cls, error, ignore=("missing",)):
            raise SettingsError(problems, where) from None


def _validate(cls: type[T], table: Mapping[str, Any]) -> T:
    # TOML has the types of JSON. In strict mode, pydantic reads JSON lists as tuples, tables as
    # dataclasses and strings as paths, without any other conversion. Dates become strings.
    text = json.dumps(table, default=str, ensure_ascii=False).encode(errors="replace")
    return TypeAdapter(cls).validate_json(text)


def to_table(settings: Any) -> dict[str, Any]:
    """Convert a dataclass to plain tables, lists and values, as run folders and stores keep it."""
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


@dataclass(frozen=True)
class Setting:
    """Description of one setting.

    Attributes:
        name: dotted name; `[]` stands for each item of a list of tables.
        allowed: allowed values in words.
        default: JSON value, None if there is no default.
        required: whether a value must be given.
        meaning: docstring of the field.
    """

    name: str
    allowed: str
    default: Any
    required: bool
    meaning: str


def describe(cls: type, prefix: str = "") -> list[Setting]:
    """All settings of a settings class, including those of nested tables."""
    schema = _schema(cls)
    return list(_leaves(schema, schema, prefix))


def _leaves(root: Schema, table: Schema, prefix: str) -> Iterator[Setting]:
    for key, node in table["properties"].items():
        kinds = _kinds(root, node)
        items = [inner for kind in kinds for inner in _kinds(root, kind.get("items", {}))]
        if inner := next((kind for kind in kinds if "properties" in kind), None):
            yield from _leaves(root, inner, f"{prefix}{key}.")
        elif inner := next((item for item in items if "properties" in item), None):
            yield from _leaves(root, inner, f"{prefix}{key}[].")
        else:
            yield Setting(
                name=f"{prefix}{key}",
                allowed=_allowed(root, node),
                default=node.get("default"),
                required=key in table.get("required", ()),
                meaning=_meaning(node),
            )


def _meaning(node: Schema) -> str:
    return " ".join(node.get("description", "").split())


@functools.cache
def _schema(cls: type) -> Schema:
    return TypeAdapter(cls).json_schema()


def _kinds(root: Schema, node: Schema) -> list[Schema]:
    """Alternatives of a schema: itself, or the members of a union."""
    if "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    if "anyOf" not in node:
        return [node]
    return [kind for each in node["anyOf"] for kind in _kinds(root, each)]


def _problems(
    cls: type, error: ValidationError, prefix: str = "", *, ignore: Sequence[str] = ()
) -> list[str]:
    errors = [each for each in error.errors() if each["type"] not in ignore]
    lines = [line for each in errors for line in _lines(cls, each, prefix)]
    return list(dict.fromkeys(lines))  # a union reports the same problem once per alternative


def _lines(cls: type, error: Any, prefix: str) -> tuple[str, ...]:
    root, loc, kind = _schema(cls), error["loc"], error["type"]
    if kind == "missing" and isinstance(loc[-1], int):
        loc = loc[:-1]  # list too short: describe the whole list
    name, node = _at(root, loc, prefix)
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, SettingsError):
        return cause.problems
    if cause is not None:
        return (f"{name}: {str(cause).rstrip('.')}",)
    if kind == "missing" and node is not None and loc == error["loc"]:
        return (f"{name} is required: {_meaning(node).rstrip('.')}",)
    if node is None:
        return (f"{name} is not a setting; {_near(cls, name, prefix)}",)
    allowed = _allowed(root, node)
    if kind == "finite_number":  # infinity is above 0 but not allowed
        allowed = allowed.replace("a number", "a finite number", 1)
    return (f"{name} must be {allowed}; found {_shown(error['input'])}",)


def _at(root: Schema, loc: tuple[int | str, ...], prefix: str) -> tuple[str, Schema | None]:
    """Dotted name of a location in the settings, and its schema (None for an unknown key)."""
    name, node = prefix, root
    for key in loc:
        kinds = _kinds(root, node)
        if isinstance(key, int):
            lists = [kind for kind in kinds if kind.get("type") == "array"]
            items = lists[0].get("prefixItems", ()) if lists else ()
            node = items[key] if key < len(items) else lists[0].get("items", {})
            name = f"{name.rstrip('.')}[{key}]."
            continue
        tables = [kind["properties"] for kind in kinds if "properties" in kind]
        if not tables:  # pydantic's name for an alternative of a union
            break
        if key not in tables[0]:
            return f"{name}{key}", None
        name, node = f"{name}{key}.", tables[0][key]
    return name.rstrip("."), node


def _near(cls: type, name: str, prefix: str) -> str:
    """Suggest settings with a similar name, or list those of the same table."""
    leaves = [setting.name for setting in describe(cls, prefix)]
    tables = {leaf.rpartition(".")[0] for leaf in leaves} - {"", prefix.rstrip(".")}
    ends: dict[str, list[str]] = {}
    for known in [*leaves, *sorted(tables)]:
        ends.setdefault(known.rpartition(".")[2], []).append(known)
    before, _, end = name.rpartition(".")
    near = [known for each in difflib.get_close_matches(end, ends) for known in ends[each]]
    if near:
        return f"did you mean {' or '.join(near[:3])}?"
    beside = [known for known in leaves if known.rpartition(".")[0] == before]
    return f"known: {', '.join(beside or leaves)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "object": "a table",
}


def _allowed(root: Schema, node: Schema) -> str:
    kinds = [kind for kind in _kinds(root, node) if kind.get("type") != "null"]
    return " or ".join(_kind_words(root, kind) for kind in kinds)


def _kind_words(root: Schema, kind: Schema) -> str:
    if "const" in kind:
        return str(kind["const"])
    if "enum" in kind:
        return f"one of {', '.join(map(str, kind['enum']))}"
    if kind.get("format") == "path":
        return "a path"
    if kind.get("type") == "array":
        fixed = kind.get("prefixItems", [])
        first: Schema = fixed[0] if fixed else kind["items"]
        return f"a list{f' of {len(fixed)}' if fixed else ''}, each {_allowed(root, first)}"
    return f"{_WORDS[kind['type']]}{_bounds(kind)}"


def _bounds(kind: Schema) -> str:
    if "minimum" in kind and "maximum" in kind:
        return f" from {_number(kind['minimum'])} to {_number(kind['maximum'])}"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    bounds = [f"{word} {_number(kind[key])}" for key, word in words.items() if key in kind]
    of = " of" if bounds and bounds[0].startswith("at") else ""
    return " ".join(["", *of.split(), " and ".join(bounds)]) if bounds else ""


def _number(value: float) -> str:
    return "2**63 - 1" if value == 2**63 - 1 else f"{value:g}"
