"""Settings: every problem at once, by its dotted name, however they are made."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from fkdpipe.common import config
from fkdpipe.common.config import Probability, Share
from fkdpipe.common.errors import UsageError
from fkdpipe.train import methods
from fkdpipe.train.settings import OptimizerSettings, ScheduleSettings, TrainSettings, describe


@config.settings
class Inner:
    """A table within."""

    rate: PositiveFloat = 0.1
    """How fast."""
    betas: tuple[float, ...] | None = None


@config.settings
class Outer:
    """One of each kind."""

    name: str
    """What it is called."""
    count: PositiveInt = 4
    """How many, at least
    one."""
    of: PositiveInt = 2
    share: Share = 1.0
    size: Annotated[int, Field(ge=8, lt=100)] | None = None
    kind: Literal["a", "b"] = "a"
    weight: PositiveFloat | Literal["auto"] = "auto"
    file: Path | None = None
    flag: bool = False
    span: tuple[float, float] = (0.0, 1.0)
    extra: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    several: tuple[Inner, ...] = ()

    @field_validator("of")
    @classmethod
    def _divides(cls, of: int, info: ValidationInfo) -> int:
        if info.data.get("count", 0) % of:
            raise UsageError(f"{info.data['count']} is no multiple of {of}.")
        return of


def problems(table: dict[str, Any], cls: type = Outer) -> tuple[str, ...]:
    with pytest.raises(config.SettingsError) as raised:
        config.build(cls, {"name": "x", **table})
    return raised.value.problems


def test_values_of_every_kind_are_read():
    table = {
        "name": "x", "count": 6, "share": 1, "size": 8, "kind": "b", "weight": 2, "file": "a/b",
        "flag": True, "span": [1, 2.5], "extra": {"deep": [1, {"er": 2}]},
        "inner": {"betas": [1, 0.5]}, "maybe": {"rate": 1}, "several": [{"rate": 2.0}, {}],
    }  # fmt: skip
    made = config.build(Outer, table)
    assert made == Outer(
        "x", 6, share=1.0, size=8, kind="b", weight=2.0, file=Path("a/b"), flag=True,
        span=(1.0, 2.5), extra={"deep": [1, {"er": 2}]}, inner=Inner(betas=(1.0, 0.5)),
        maybe=Inner(rate=1.0), several=(Inner(rate=2.0), Inner()),
    )  # fmt: skip
    assert isinstance(made.share, float)
    assert config.build(Outer, config.to_table(made)) == made


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"count": True}, "count must be a whole number above 0; found True"),
        ({"count": 2.0}, "count must be a whole number above 0; found 2.0"),
        ({"count": "2"}, "count must be a whole number above 0; found '2'"),
        ({"share": True}, "share must be a number above 0 and at most 1; found True"),
        ({"share": float("nan")}, "share must be a finite number above 0 and at most 1; found"),
        ({"inner": {"rate": float("inf")}}, "inner.rate must be a finite number above 0; found"),
        ({"size": 100}, "size must be a whole number of at least 8 and below 100; found 100"),
        ({"kind": "c"}, "kind must be one of a, b; found 'c'"),
        ({"weight": "autom"}, "weight must be a number above 0 or auto; found 'autom'"),
        ({"file": 3}, "file must be a path; found 3"),
        ({"flag": 1}, "flag must be true or false; found 1"),
        ({"flag": "yes"}, "flag must be true or false; found 'yes'"),
        ({"span": [1]}, "span must be a list of 2, each a number; found [1]"),
        ({"span": 3}, "span must be a list of 2, each a number; found 3"),
        ({"span": [1, "x"]}, "span[1] must be a number; found 'x'"),
        ({"extra": 3}, "extra must be a table; found 3"),
        ({"inner": 3}, "inner must be a table; found 3"),
        ({"maybe": 3}, "maybe must be a table; found 3"),
        ({"maybe": {"rate": 0}}, "maybe.rate must be a number above 0; found 0"),
        ({"several": [{}, {"rate": 0}]}, "several[1].rate must be a number above 0; found 0"),
        ({"several": [{"rat": 1}]}, "several[0].rat is not a setting; did you mean"),
        ({"of": 3}, "of: 4 is no multiple of 3"),
        ({"inner": {"betas": 0.9}}, "inner.betas must be a list, each a number; found 0.9"),
        ({"cuont": 1}, "cuont is not a setting; did you mean count?"),
        ({"rate": 1}, "rate is not a setting; did you mean inner.rate or maybe.rate"),
        ({"iner": {"rate": 1}}, "iner is not a setting; did you mean inner?"),
        ({"inner": {"zzz": 1}}, "inner.zzz is not a setting; known: inner.rate, inner.betas"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_would(table, problem):
    (found,) = problems(table)
    assert found.startswith(problem)


def test_all_problems_are_told_at_once_and_cross_checks_where_their_fields_are_valid():
    found = problems({"name": 3, "count": 5, "kind": "c", "inner": {"rate": -1, "zzz": 1}, "q": 1})
    assert [each.split()[0] for each in found] == [
        "name", "of:", "kind", "inner.rate", "inner.zzz", "q",
    ]  # fmt: skip
    assert len(problems({"count": 0, "of": 3})) == 1  # nothing is said of a count that is none
    with pytest.raises(UsageError) as raised:
        config.build(Outer, {"count": 0}, where="mine.toml")
    lines = str(raised.value).splitlines()
    assert lines[0] == "mine.toml: 2 problems:"
    assert lines[1].strip() == "name is required: What it is called"


def test_what_python_makes_is_checked_alike_and_stays_frozen():
    for make in (
        lambda: Outer("x", count=0),
        lambda: Outer("x", inner=3),
        lambda: Outer("x", unknown=1),
        lambda: Outer(),
        lambda: dataclasses.replace(Outer("x"), count=3),
        lambda: Outer("x", span=[0.0, 1.0]),
    ):
        with pytest.raises(config.SettingsError):
            make()
    with pytest.raises(config.SettingsError, match=r"^2 problems:\n  count .*\n  share "):
        Outer("x", count=0, share=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Outer("x").count = 3


def test_missing_settings_can_be_passed_over():
    config.check(Outer, {"count": 4})
    with pytest.raises(config.SettingsError, match="count must be"):
        config.check(Outer, {"count": 0})


def test_every_setting_is_described():
    described = {each.name: each for each in config.describe(Outer, "p.")}
    assert described["p.name"] == config.Setting("p.name", "text", None, True, "What it is called.")
    assert described["p.count"].meaning == "How many, at least one."
    assert described["p.inner.rate"].default == 0.1
    assert {"p.maybe.rate", "p.several[].rate", "p.extra"} <= described.keys()
    assert described["p.span"].default == [0.0, 1.0]


SETTINGS = [
    ("fkdpipe.train.settings", "TrainSettings"),
    ("fkdpipe.labelgen.settings", "GenerateSettings"),
    ("fkdpipe.labelgen.fit_basis", "FitSettings"),
    ("fkdpipe.downstream.transfer", "TransferSettings"),
    ("fkdpipe.interchange.source", "ImportSettings"),
    ("fkdpipe.interchange.exporting", "ExportSettings"),
]


@pytest.mark.parametrize(("module", "name"), SETTINGS)
def test_each_setting_has_its_meaning_beside_it(module, name):
    for setting in config.describe(getattr(importlib.import_module(module), name)):
        assert setting.meaning, setting.name


@pytest.mark.parametrize("name", methods.METHODS)
def test_each_setting_of_a_method_has_its_meaning_beside_it(name):
    for setting in methods.describe({"name": name}):
        assert setting.meaning, setting.name


def test_a_run_tells_everything_that_is_wrong_with_it():
    words = (
        "epochs=0 window=0 seed=-1 fraction=2.0 ema=3.0 optimizer.lr=-1.0 batch_size=10 "
        "crops_per_image=3 method.name=kd method.soft_weight=2 method.temprature=1 target=soft"
    )
    table = config.merge(*map(config.parse_assignment, words.split()))
    found = problems({"student": "resnet18", **table}, TrainSettings)
    assert [each.split()[0].rstrip(":") for each in found if not each.startswith("name ")] == [
        "target", "epochs", "crops_per_image", "method.soft_weight", "method.temprature", "seed",
        "window", "fraction", "ema", "optimizer.lr",
    ]  # fmt: skip
    assert "method.temprature is not a setting; did you mean method.temperature?" in found


def test_cross_checks_of_a_run():
    with pytest.raises(UsageError, match="12 epochs of single crops do not fit 10 epochs"):
        TrainSettings("r", epochs=10, schedule=ScheduleSettings(single_first=12))
    with pytest.raises(UsageError, match="256 is not a multiple of 3 crops per image"):
        TrainSettings("r", crops_per_image=3)
    with pytest.raises(UsageError, match=r"method.name must be one of dpk.*found 'kdd'"):
        TrainSettings("r", method={"name": "kdd"})
    run = TrainSettings("r", optimizer=OptimizerSettings(lr=1))
    with pytest.raises(UsageError, match="epochs must be"):
        dataclasses.replace(run, epochs=0)


def test_a_runs_settings_are_described_with_those_of_its_method():
    names = [setting.name for setting in describe({"method": {"name": "kdep"}})]
    assert names[names.index("method.name") :][:2] == ["method.name", "method.alignment"]
    assert "method.feature_weight" in names
    assert "method" not in names
    assert len(set(names)) == len(names)


def test_settings_and_their_mistakes_need_no_torch():
    program = (
        "import sys; from fkdpipe.train.settings import TrainSettings\n"
        "try: TrainSettings('r', epochs=0)\n"
        "except ValueError: print('torch' in sys.modules)"
    )
    made = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert made.stdout.strip() == "False"


def test_probability_and_share_differ_at_zero():
    @config.settings
    class Both:
        probability: Probability = 0.0
        share: Share = 1.0

    with pytest.raises(UsageError, match="share must be a number above 0 and at most 1"):
        Both(share=0.0)
