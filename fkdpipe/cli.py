"""The command line: parse, one library call, render.

stdout carries results, stderr progress and logs. Exit codes: 0 ok, 1 failed, 2 wrong usage.
Heavy packages are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import signal
from functools import wraps
from inspect import cleandoc
from typing import Any, NoReturn

import click

from fkdpipe import __version__
from fkdpipe.commands import (
    basis,
    demo,
    generate,
    inspect,
    interchange,
    plan,
    report,
    store,
    train,
    transfer,
)  # fmt: skip
from fkdpipe.common import disk
from fkdpipe.common.errors import FkdpipeError


class _Failed(click.ClickException):
    exit_code = 1


class _Misused(click.ClickException):
    exit_code = 2


class _Commands(click.Group):
    """Turns every error meant for users into one message and its exit code, in one place."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except FkdpipeError as error:
            kind = _Misused if error.exit_code == 2 else _Failed
            raise kind(str(error)) from error
        except OSError as error:
            if error.errno is None or error.errno == errno.EPIPE:  # no words; the reader has left
                raise
            raise _Failed(_disk_message(error)) from error
        except KeyboardInterrupt:
            message = "interrupted. What is committed is kept; start the same command to go on."
            raise _Failed(message) from None

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a user's work, not of the alphabet


def _disk_message(error: OSError) -> str:
    path = "a file" if error.filename is None else os.fsdecode(error.filename)
    return (
        f"{path}: {disk.words(error, 'it')} and start the same command again; what was complete "
        "before is kept."
    )


def _naming_out(command: click.Command) -> None:
    """An error of the disk that names no file (a write's never does) names what the command
    writes."""
    run = command.callback
    assert run is not None

    @wraps(run)
    def named(**given: Any) -> Any:
        try:
            return run(**given)
        except OSError as error:
            out = given.get("out") or given.get("basis")
            if error.errno is None or error.filename is not None or out is None:
                raise
            raise OSError(error.errno, os.strerror(error.errno), str(out)) from error

    command.callback = named


def _example_last(command: click.Command) -> None:
    """The example that ends a docstring ends the help too, below the options."""
    words, mark, example = cleandoc(command.help or "").partition("\b\nExample:")
    command.help, command.epilog = words.rstrip(), mark + example


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fkdpipe")
def cli() -> None:
    """Distil image models without a teacher in the loop.

    \b
    1. generate   teachers label recorded crops once, into a store
    2. train      a student replays exactly those crops
    3. report     what the store takes, and what it serves

    \b
    Example:
      fkdpipe demo
    """


for command in (
    demo.demo,
    basis.fit_basis,
    generate.generate,
    train.train,
    train.evaluate,
    transfer.transfer,
    report.report,
    plan.plan,
    inspect.inspect,
    inspect.analyse,
    store.verify,
    interchange.import_,
    interchange.export,
    store.thin,
):
    _example_last(command)
    _naming_out(command)
    cli.add_command(command)
_example_last(cli)


def main() -> None:
    """The entry point: SIGTERM ends a command as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)
    cli()


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
