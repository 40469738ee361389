"""Write docs/cli.md from --help; `make docs` runs it and a test holds it."""

from __future__ import annotations

from pathlib import Path

import click

from fkdpipe.cli import cli

FILE = Path(__file__).with_name("cli.md")


def render() -> str:
    blocks = [
        "# Command line",
        "Generated from `--help` by `make docs`. Exit codes: 0 ok, 1 failed, 2 wrong usage.\n"
        "Results go to stdout, progress and messages to stderr.",
    ]
    for name, command in cli.commands.items():
        # A command that ran in this process keeps the help option of that run; a new one does not.
        unused = click.Command(
            name, params=command.params, help=command.help, epilog=command.epilog
        )
        context = click.Context(unused, info_name=f"fkdpipe {name}", terminal_width=90)
        blocks.append(f"## fkdpipe {name}\n\n```\n{unused.get_help(context)}\n```")
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    FILE.write_text(render())
