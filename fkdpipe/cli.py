"""The command line: parse the arguments, call the library once, print the result.

Results go to stdout, progress and logs to stderr. Exit codes: 0 success, 1 failure, 2 wrong usage.
Heavy packages are imported inside the commands to keep `--help` fast.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from functools import wraps
from inspect import cleandoc
from pathlib import Path
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
    """Turn every error meant for users into a message and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except FkdpipeError as error:
            kind = _Misused if error.exit_code == 2 else _Failed
            raise kind(str(error)) from error
        except OSError as error:
            if error.errno is None or error.errno == errno.EPIPE:  # no message, or a closed pipe
                raise
            raise _Failed(_disk_message(error)) from error
        except KeyboardInterrupt as error:
            kept = str(error) or "nothing new is finished; earlier work is kept."
            raise _Failed(f"interrupted: {kept}") from None

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)  # in workflow order, not alphabetical


def _disk_message(error: OSError) -> str:
    path = "a file" if error.filename is None else os.fsdecode(error.filename)
    return (
        f"{path}: {disk.words(error, 'it')} and run the same command again; finished work is kept."
    )


def _guard_paths(command: click.Command) -> None:
    """Refuse URLs where a command takes local paths, and make a disk error without a file name (as
    of any failed write) name the command's output."""
    run = command.callback
    assert run is not None

    @wraps(run)
    def guarded(**arguments: Any) -> Any:
        context = click.get_current_context()
        for parameter in command.params:
            value = arguments.get(parameter.name or "")
            for path in value if isinstance(value, tuple) else (value,):
                if isinstance(path, Path):
                    disk.local_path(path, parameter.get_error_hint(context).strip("'"))
        try:
            return run(**arguments)
        except OSError as error:
            out = arguments.get("out") or arguments.get("basis")
            if error.errno is None or error.filename is not None or out is None:
                raise
            raise OSError(error.errno, os.strerror(error.errno), str(out)) from error

    command.callback = guarded


def _example_last(command: click.Command) -> None:
    """Move the example at the end of a docstring below the options."""
    text, mark, example = cleandoc(command.help or "").partition("\b\nExample:")
    command.help, command.epilog = text.rstrip(), mark + example


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fkdpipe")
def cli() -> None:
    """Distil image models without a teacher in the training loop.

    \b
    1. generate   teachers label recorded crops once and write a store
    2. train      a student trains on exactly those crops
    3. report     shows the size of the store and the targets it serves

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
    _guard_paths(command)
    cli.add_command(command)
_example_last(cli)


def main() -> None:
    """Entry point. SIGTERM ends a command just as Ctrl-C does; characters that the terminal cannot
    print become question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, _interrupt)
    cli()


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
