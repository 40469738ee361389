"""`fkdpipe demo`."""

from __future__ import annotations

from pathlib import Path

import click

from fkdpipe.commands import terminal


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for the images, store and runs.",
)
def demo(out: Path) -> None:
    """Run the whole pipeline on real images.

    It takes a few minutes and needs no GPU.

    \b
    Example:
      fkdpipe demo --out demo
    """
    from fkdpipe.commands import demo_data as demo_

    outcome = demo_.run(out, say=click.echo, reporter=terminal.reporter())
    click.echo()
    terminal.print_table(
        "Held-out images",
        ["", "top-1 %"],
        [
            [f"teacher ({demo_.TEACHER})", f"{outcome.teacher:.1f}"],
            [f"student ({demo_.STUDENT}), stored labels", f"{outcome.distilled:.1f}"],
            ["same student, ground truth only", f"{outcome.ground_truth:.1f}"],
        ],
    )
    click.echo(f"Everything is in {outcome.out}: images, teacher, store, student, baseline.")
