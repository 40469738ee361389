"""`fkdpipe fit-basis`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fkdpipe.commands import options, terminal

if TYPE_CHECKING:
    from fkdpipe.labelgen.fit_basis import Fitted


@click.command("fit-basis", cls=options.WithSettings)
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("basis", type=click.Path(path_type=Path))
@click.option("--teacher", metavar="NAME[=FILE]", help="Teacher, named as for generate.")
@click.option("--fraction", type=float, help="Share of the images of each class.  [default: 0.1]")
@click.option(
    "--layer",
    metavar="pre|post",
    help="Feature layer: before (pre) or after (post) the last activation.  [default: pre]",
)
@click.option("--crops", type=int, metavar="M", help="Number of crops per image.  [default: 1]")
@click.option("--seed", type=int, help="Seed for sampling images and crops.  [default: 0]")
@click.option("--store", help="Store that provides the images and crops.")
@click.option(
    "--precision", help="Teacher precision: float32, bfloat16 or float16.  [default: float32]"
)
@click.option(
    "--components",
    type=click.IntRange(min=1),
    metavar="D",
    help="Number of components to report statistics for.  [default: all]",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="File for a plot of the standard deviations (.png, .pdf or .svg).",
)
@options.device_option
@options.json_option
@options.recipe_options
def fit_basis(
    data: Path,
    basis: Path,
    store: str | None,
    components: int | None,
    plot: Path | None,
    device: str,
    as_json: bool,
    recipe: Path | None,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Fit an SVD basis of a teacher's features on crops of DATA.

    The basis is written to the file BASIS. Use the same crop settings and seed as for `generate`,
    so that it is fitted on the same crops. Class folders are not required. Under torchrun, the
    processes share the images.

    \b
    Example:
      fkdpipe fit-basis images basis.safetensors --teacher resnet50 --fraction 0.1
    """
    from fkdpipe.common.errors import UsageError
    from fkdpipe.labelgen.fit_basis import FitSettings

    settings = options.resolve(FitSettings, recipe, assignments, flags)
    if basis.is_dir() or not basis.parent.is_dir():
        raise UsageError(f"{basis}: BASIS must be a file in an existing folder.")
    if basis.exists():
        raise UsageError(
            f"{basis} already exists, and stores that use it still need it. Choose another name, "
            "or delete the file first."
        )
    from fkdpipe.common import distributed
    from fkdpipe.labelgen import basis_plot
    from fkdpipe.labelgen import fit_basis as fitting
    from fkdpipe.labelgen.generate import Resources
    from fkdpipe.networks import features, teachers
    from fkdpipe.storage.store import open_store

    if plot:
        terminal.check_file(plot, (".png", ".pdf", ".svg"))
    rank = distributed.current()
    reporter = terminal.reporter()
    where = options.choose_device(device, rank.local)
    (teacher,) = teachers.load_teachers(
        options.networks([flags["teacher"]], [settings.teacher]),
        class_names=(),
        precision=settings.precision,
        device=where,
        needs=settings.needs,
    )
    if store:
        sample = fitting.from_store(open_store(store), data, settings)
    else:
        sample = fitting.from_folder(data, settings, reporter)
    threads = settings.threads or distributed.default_threads()
    resources = Resources(device=where, batch=settings.batch_size, threads=threads, rank=rank)
    fitted = fitting.fit(
        sample, teacher, settings, resources, components=components, reporter=reporter
    )
    if not rank.main:
        return
    features.save_basis(basis, fitted.basis)
    width = min(components or fitted.basis.rank, fitted.basis.rank)
    if components and width < components:
        click.echo(f"The features span {width} of the {components} components asked for.", err=True)
    if plot:
        basis_plot.plot(fitted.basis, plot, width)
    _print_fitted(basis, fitted, width, as_json=as_json)


def _print_fitted(file: Path, fitted: Fitted, width: int, *, as_json: bool) -> None:
    from fkdpipe.networks import features

    b = fitted.basis
    ratios = features.std_ratios(b, width)
    explained = 100 * float(b.explained_K[width - 1])
    if as_json:
        terminal.print_json(
            {
                "basis": str(file),
                "digest": b.digest,
                "images": fitted.images,
                "vectors": b.count,
                "channels": len(b.mean_D),
                "rank": b.rank,
                "components": width,
                "explained_percent": explained,
                "std_ratio": ratios,
                "failed": fitted.failed,
            }
        )
        return
    click.echo(
        f"{file}: {b.rank} components from {len(b.mean_D)} channels, fitted on {b.count:,} crops "
        f"of {fitted.images:,} images; {len(fitted.failed)} left out."
    )
    click.echo(f"The leading {width} components explain {explained:.2f} % of the variance.")
    names = {
        "raw": "all channels, before SVD",
        "svd": f"{width} components",
        "pts": "after PTS, n = 3, for normally distributed values",
        "sn": "after scale normalisation",
        "sm": "after Std Matching",
    }
    rows = [[text, f"{ratios[name]:,.2f}"] for name, text in names.items()]
    terminal.print_table("", ["features", "Std Ratio"], rows)
