"""`fkdpipe inspect` and `fkdpipe analyse`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fkdpipe.commands import options, terminal

if TYPE_CHECKING:
    from fkdpipe.inspect.results import Analysis
    from fkdpipe.inspect.sources import Opened

KINDS = (".png", ".html")
ORDERS = ("stored", "sure", "unsure", "entropy", "worst", "disagreement")

source_option = click.option(
    "--source", multiple=True, help="Labels to use, if the store has several; repeat to compare."
)
partial_option = click.option(
    "--partial", is_flag=True, help="Use the finished units of an unfinished store."
)
limit_option = click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=2000,
    show_default=True,
    metavar="IMAGES",
    help="Number of images to examine, a random sample; 0 for all.",
)


@click.command()
@click.argument("store")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Output file: FILE.png or FILE.html.",
)
@click.option("--crop", metavar="KEY:INDEX", help="Show one crop.")
@click.option("--image", metavar="KEY", help="Show one image.")
@click.option("--class", "class_name", metavar="NAME", help="Show images of one class.")
@click.option(
    "--by",
    type=click.Choice(ORDERS),
    default="stored",
    show_default=True,
    help="Order of the crops: as stored (random), by confidence, by entropy, lowest probability of "
    "the image's class first, or by disagreement between two sources.",
)
@click.option("--count", type=int, default=12, show_default=True, help="Number of images.")
@click.option("--crops", type=int, default=4, show_default=True, help="Number of crops per image.")
@source_option
@limit_option
@partial_option
@options.cache_option
def inspect(
    store: str,
    data: Path,
    out: Path,
    crop: str | None,
    image: str | None,
    class_name: str | None,
    by: Any,
    count: int,
    crops: int,
    source: tuple[str, ...],
    limit: int,
    partial: bool,
    cache: Path | None,
) -> None:
    """Draw images of DATA with the crops and labels of STORE.

    \b
    Example:
      fkdpipe inspect store images --by worst --out worst.html
    """
    from fkdpipe.common.errors import UsageError
    from fkdpipe.inspect import choose, pages, sheet, sources, views

    if sum(each is not None for each in (crop, image, class_name)) > 1:
        raise UsageError("use only one of --crop, --image and --class.")
    choice = choose.Choice(image, class_name, by, count, crops)
    terminal.check_file(out, KINDS)
    reporter = terminal.reporter()
    opened = _open(store, source, partial, cache, reporter)
    if crop is not None:
        chosen = [choose.one_crop(opened, crop)]
    else:
        rows = sources.sample_rows(opened, limit)
        chosen = choose.choose(opened, choice, rows, reporter=reporter)
    contents = views.look(opened, data, chosen)
    what = crop or image or (f"class {class_name}" if class_name else "images")
    title = f"{store}: {what}, {ORDER_WORDS[by]}"
    if out.suffix == ".html":
        crops_M = opened.finished.crops_per_image
        lead = f"{opened.store.num_images:,} images, {crops_M} crops per image."
        terminal.write_file(out, pages.sheet_page(contents, title=title, lead=lead).encode())
    else:
        terminal.write_file(out, sheet.to_png(sheet.draw(contents, title=title)))
    for why in contents.left_out:
        click.echo(f"left out: {why}", err=True)
    shown = sum(len(view.crops) for view in contents.images)
    click.echo(f"{out}: {len(contents.images)} images, {shown} crops.")


ORDER_WORDS = {
    "stored": "as stored",
    "sure": "most confident first",
    "unsure": "least confident first",
    "entropy": "highest entropy first",
    "worst": "lowest probability of the image's class first",
    "disagreement": "largest disagreement first",
}


@click.command()
@click.argument("store")
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="File for plots: FILE.png or FILE.html."
)
@click.option(
    "--model",
    multiple=True,
    metavar="NAME[=FILE]",
    help="Model to compare on the same crops (requires DATA).",
)
@click.option(
    "--class-map",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File that maps a model's outputs to classes; one for all models or one each.",
)
@options.numbered_option
@click.option(
    "--crops",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Number of crops per image; 0 for all.",
)
@source_option
@limit_option
@partial_option
@options.cache_option
@options.device_option
@options.json_option
def analyse(
    store: str,
    data: Path | None,
    out: Path | None,
    model: tuple[str, ...],
    class_map: tuple[Path, ...],
    numbered: bool,
    crops: int,
    source: tuple[str, ...],
    limit: int,
    partial: bool,
    cache: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Analyse labels: entropy, agreement, reliability, distances.

    \b
    Example:
      fkdpipe analyse store --out labels.html
    """
    import numpy as np

    from fkdpipe.common.errors import UsageError
    from fkdpipe.inspect import analysis, sources

    if model and data is None:
        raise UsageError("--model requires DATA, the images of the store.")
    if not model and (data is not None or class_map or numbered):
        raise UsageError("DATA, --class-map and --numbered can only be used with --model.")
    if out is not None:
        terminal.check_file(out, KINDS)
    reporter = terminal.reporter()
    opened = _open(store, source, partial, cache, reporter)
    rows = sources.sample_rows(opened, limit)
    count = min(crops or opened.finished.crops_per_image, opened.finished.crops_per_image)
    with contextlib.ExitStack() as stack:
        models = []
        if data and model:
            models = _models(stack, opened, data, model, class_map, numbered, device)
        result = analysis.analyse(opened, rows, np.arange(count), models=models, reporter=reporter)
    if out is not None:
        _write_analysis(out, result)
    if as_json:
        terminal.print_json(result.to_json())
    else:
        _print_analysis(result)


def _models(
    stack: contextlib.ExitStack,
    opened: Opened,
    data: Path,
    names: tuple[str, ...],
    class_map: tuple[Path, ...],
    numbered: bool,
    device: str,
) -> list[Any]:
    """(name, predictor) of each model; the stack keeps their replays open."""
    from fkdpipe.inspect import models
    from fkdpipe.networks import teachers
    from fkdpipe.pixels import images
    from fkdpipe.pixels.replay import View, open_replay

    root = images.split_root(data, "train")
    loaded = teachers.load_teachers(
        options.networks(names, names),
        class_names=opened.store.images.class_names,
        class_maps=class_map,
        numbered=numbered,
        device=options.choose_device(device),
    )
    predictors = []
    for text, each in zip(names, loaded, strict=True):
        replayer = stack.enter_context(open_replay("cpu", [View.of(each.preprocessing)]))
        name = text.partition("=")[0] if "=" in text else Path(text).name
        predictors.append((f"model {name}", models.predictor(opened, root, each, replayer)))
    return predictors


def _open(
    store: str, source: tuple[str, ...], partial: bool, cache: Path | None, reporter: Any
) -> Opened:
    from fkdpipe.inspect import sources
    from fkdpipe.storage.store import open_store

    return sources.open_labels(
        open_store(store),
        source,
        options.cache_dir(cache),
        allow_partial=partial,
        reporter=reporter,
    )


def _write_analysis(out: Path, result: Analysis) -> None:
    from fkdpipe.inspect import pages, plots

    if out.suffix == ".html":
        terminal.write_file(out, pages.analysis_page(result).encode())
    else:
        title = f"Labels of {result.url}: {result.images:,} images, {result.crops:,} crops"
        terminal.write_file(out, plots.to_png(plots.together(plots.analysis_panels(result), title)))


def _print_analysis(result: Analysis) -> None:
    from fkdpipe.inspect import pages

    click.echo(f"{result.url}: {result.images:,} images, {result.crops:,} crops analysed\n")
    terminal.print_table("", *pages.summary(result))
    title = "Cross-entropy of row a -> column b: mean of -sum b log a, in nats"
    terminal.print_table(title, *pages.distance_table(result))
    for source in result.sources:
        if source.changes:
            title = f"Difference of each target from the labels of {source.name}"
            columns = ["target", "total variation", "KL (nats)"]
            terminal.print_table(title, columns, pages.change_rows(source))
    if result.classes:
        rows = pages.class_rows(result, 10)
        title = f"Least agreement, {len(rows)} of {len(result.classes):,} classes"
        terminal.print_table(title, pages.CLASS_COLUMNS, rows)
