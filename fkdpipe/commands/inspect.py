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
    "--source", multiple=True, help="Which labels, when the store has several; repeat to compare."
)
partial_option = click.option(
    "--partial", is_flag=True, help="Look at the finished units of an unfinished store."
)
limit_option = click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=2000,
    show_default=True,
    metavar="IMAGES",
    help="Look through so many; a store's order is random, so they are a fair sample. 0: all.",
)


@click.command()
@click.argument("store")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="FILE.png or FILE.html")
@click.option("--crop", metavar="KEY:INDEX", help="One crop.")
@click.option("--image", metavar="KEY", help="One image.")
@click.option("--class", "class_name", metavar="NAME", help="Images of one class.")
@click.option(
    "--by",
    type=click.Choice(ORDERS),
    default="stored",
    show_default=True,
    help="Which crops first: as stored (at random), by confidence, entropy, how little the "
    "image's class gets, or disagreement between two sources.",
)
@click.option("--count", type=int, default=12, show_default=True, help="Images.")
@click.option("--crops", type=int, default=4, show_default=True, help="Crops of each image.")
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
    """A contact sheet: images of DATA with the crops of STORE drawn, and what their labels say.

    \b
    Example:
      fkdpipe inspect store images --by worst --out worst.html
    """
    from fkdpipe.common.errors import UsageError
    from fkdpipe.inspect import choose, pages, sheet, sources, views

    if sum(each is not None for each in (crop, image, class_name)) > 1:
        raise UsageError("choose by one of --crop, --image and --class.")
    choice = choose.Choice(image, class_name, by, count, crops)
    terminal.check_file(out, KINDS)
    reporter = terminal.reporter()
    opened = _open(store, source, partial, cache, reporter)
    if crop is not None:
        chosen = [choose.one_crop(opened, crop)]
    else:
        rows = sources.sample_rows(opened, limit)
        chosen = choose.choose(opened, choice, rows, reporter=reporter)
    found = views.look(opened, data, chosen)
    what = crop or image or (f"class {class_name}" if class_name else "images")
    title = f"{store}: {what}, {ORDER_WORDS[by]}"
    if out.suffix == ".html":
        lead = (
            f"{opened.store.num_images:,} images, {opened.finished.crops_per_image} crops of each."
        )
        terminal.write_file(out, pages.sheet_page(found, title=title, lead=lead).encode())
    else:
        terminal.write_file(out, sheet.to_png(sheet.draw(found, title=title)))
    for why in found.left_out:
        click.echo(f"left out: {why}", err=True)
    shown = sum(len(view.crops) for view in found.images)
    click.echo(f"{out}: {len(found.images)} images, {shown} crops.")


ORDER_WORDS = {
    "stored": "as stored",
    "sure": "surest first",
    "unsure": "least sure first",
    "entropy": "largest entropy first",
    "worst": "least probability of the image's class first",
    "disagreement": "largest disagreement first",
}


@click.command()
@click.argument("store")
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Plots: FILE.png or FILE.html")
@click.option(
    "--model",
    multiple=True,
    metavar="NAME[=FILE]",
    help="Also its predictions on the same crops (needs DATA).",
)
@click.option("--class-map", multiple=True, type=click.Path(path_type=Path), help="Of the models.")
@click.option(
    "--crops",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Crops of each image; they are independent draws. 0: all.",
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
    crops: int,
    source: tuple[str, ...],
    limit: int,
    partial: bool,
    cache: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """What the labels of STORE say: entropy, agreement, reliability, distances.

    \b
    Example:
      fkdpipe analyse store --out labels.html
    """
    import numpy as np

    from fkdpipe.common.errors import UsageError
    from fkdpipe.inspect import analysis, sources

    if model and data is None:
        raise UsageError("--model needs DATA: the images its crops are cut from.")
    if not model and (data is not None or class_map):
        raise UsageError("DATA and --class-map are for the networks of --model; name one.")
    if out is not None:
        terminal.check_file(out, KINDS)
    reporter = terminal.reporter()
    opened = _open(store, source, partial, cache, reporter)
    rows = sources.sample_rows(opened, limit)
    count = min(crops or opened.finished.crops_per_image, opened.finished.crops_per_image)
    with contextlib.ExitStack() as stack:
        models = _models(stack, opened, data, model, class_map, device) if data and model else []
        found = analysis.analyse(opened, rows, np.arange(count), models=models, reporter=reporter)
    if out is not None:
        _write_analysis(out, found)
    if as_json:
        terminal.print_json(found.to_json())
    else:
        _print_analysis(found)


def _models(
    stack: contextlib.ExitStack,
    opened: Opened,
    data: Path,
    names: tuple[str, ...],
    class_map: tuple[Path, ...],
    device: str,
) -> list[Any]:
    """(name, predictions) of each model, its replay open as long as the stack is."""
    from fkdpipe.inspect import models
    from fkdpipe.networks import teachers
    from fkdpipe.pixels import images
    from fkdpipe.pixels.replay import View, open_replay

    root = images.split_root(data, "train")
    loaded = teachers.load_teachers(
        options.networks(names, names),
        class_names=opened.store.images.class_names,
        class_maps=[teachers.read_class_map(file) for file in class_map],
        device=options.choose_device(device),
    )
    made = []
    for text, each in zip(names, loaded, strict=True):
        replayer = stack.enter_context(open_replay("cpu", [View.of(each.preprocessing)]))
        name = text.partition("=")[0] if "=" in text else Path(text).name
        made.append((f"model {name}", models.predictor(opened, root, each, replayer)))
    return made


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


def _write_analysis(out: Path, found: Analysis) -> None:
    from fkdpipe.inspect import pages, plots

    if out.suffix == ".html":
        terminal.write_file(out, pages.analysis_page(found).encode())
    else:
        title = f"Labels of {found.url}: {found.images:,} images, {found.crops:,} crops"
        terminal.write_file(out, plots.to_png(plots.together(plots.analysis_panels(found), title)))


def _print_analysis(found: Analysis) -> None:
    from fkdpipe.inspect import pages

    click.echo(f"{found.url}: {found.images:,} images, {found.crops:,} crops looked at\n")
    terminal.print_table("", *pages.summary(found))
    title = "Cross-entropy of row a -> column b: mean of -sum b log a, in nats"
    terminal.print_table(title, *pages.distance_table(found))
    for source in found.sources:
        if source.changes:
            title = f"What each target does to {source.name}"
            columns = ["target", "total variation", "KL (nats)"]
            terminal.print_table(title, columns, pages.change_rows(source))
    if found.classes:
        rows = pages.class_rows(found, 10)
        title = f"Least agreement, {len(rows)} of {len(found.classes):,} classes"
        terminal.print_table(title, pages.CLASS_COLUMNS, rows)
