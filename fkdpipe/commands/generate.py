"""`fkdpipe generate`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fkdpipe.commands import options, terminal

if TYPE_CHECKING:
    from fkdpipe.labelgen.dry_run import Forecast
    from fkdpipe.labelgen.generate import Generated
    from fkdpipe.labelgen.repair import Repaired


@click.command(cls=options.WithSettings)
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("store")
@click.option(
    "--teacher",
    multiple=True,
    metavar="NAME[=FILE]",
    help="Teacher: timm model, torchvision:NAME, python:MODULE:FUNCTION or a run folder; repeat to "
    "average several.",
)
@click.option(
    "--teacher-weight",
    multiple=True,
    type=float,
    help="Relative weight of a teacher in the average; one per teacher.",
)
@click.option(
    "--form",
    help="Label form: full, logits, topk:K, topk:K:compact, hard, or none for features only.  "
    "[default: topk:10]",
)
@click.option(
    "--features",
    multiple=True,
    metavar="pre|post[:D]|map",
    help="Features to store: before or after the last activation, or the last feature map.",
)
@click.option(
    "--basis", type=click.Path(path_type=Path), help="Basis file from fit-basis, for pre:D."
)
@click.option("--crops", type=int, metavar="M", help="Total number of crops per image.")
@click.option(
    "--seed", type=int, help="Seed for crops and image order.  [default: the store's, or 0]"
)
@click.option("--source", help="Name of the labels in the store.  [default: the teachers' names]")
@click.option(
    "--class-map",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File that maps a teacher's outputs to classes; one for all teachers or one each.",
)
@options.numbered_option
@click.option("--temperature", type=float, help="Temperature of the softmax.  [default: 1]")
@click.option(
    "--precision", help="Teacher precision: float32, bfloat16 or float16.  [default: float32]"
)
@click.option("--batch-size", type=int, help="Teacher batch size in crops.  [default: 64]")
@click.option("--part", metavar="I/N", help="Part of the store to generate, counted from 1.")
@click.option("--dry-run", is_flag=True, help="Estimate size, time and memory, and keep nothing.")
@click.option("--repair", is_flag=True, help="Repair damaged units, and do nothing else.")
@options.device_option
@options.json_option
@options.recipe_options
def generate(
    data: Path,
    store: str,
    part: str | None,
    dry_run: bool,
    repair: bool,
    device: str,
    as_json: bool,
    recipe: Path | None,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Label recorded crops of the images in DATA, into STORE.

    Run the same command again to resume: only missing units are generated. Several processes can
    share a store, under torchrun or with --part on several machines. More --crops, another teacher
    or --features extend an existing store, which provides the crop distribution, seed and form.

    A --class-map file has one class name per line, in the order of the teacher's outputs, or a
    class folder and its output index, counted from 0, on each line ("n01440764 0" or
    "n01440764,0"). Lines that begin with # are ignored. It can also be JSON: a list of names, or
    an object from class to index or from index to class.

    To use your own network, pass --teacher python:PACKAGE.MODULE:FUNCTION[=FILE], where FUNCTION
    takes no arguments and returns the module. Modules in the current folder are found, as with
    python -m. A pretrained_cfg dict on the module describes its input: input_size (3, height,
    width), mean and std. This runs code, so it is accepted on the command line only, never from a
    recipe, store or run folder.

    \b
    Example:
      fkdpipe generate images store --teacher resnet50 --form topk:10 --crops 200
    """
    from fkdpipe.labelgen.settings import GenerateSettings

    if repair and store:  # --show-settings needs no store
        from fkdpipe.labelgen import existing
        from fkdpipe.storage.location import open_location

        table = options.given_table(recipe, assignments, flags)
        flags |= existing.repair_options(open_location(store), table)
    settings = options.resolve(GenerateSettings, recipe, assignments, flags)
    from fkdpipe.common import distributed
    from fkdpipe.labelgen import api

    reporter = terminal.reporter()
    where = options.choose_device(device, distributed.current().local)
    networks = options.networks(flags["teacher"], settings.teacher)
    if dry_run:
        forecast = api.forecast(
            data, store, settings, networks, device=where, part=part, reporter=reporter
        )
        _print_forecast(forecast, as_json=as_json)
        return
    result = api.run(
        data, store, settings, networks, device=where, part=part, repair=repair, reporter=reporter
    )
    if as_json:
        terminal.print_json(_to_json(result))
    else:
        _print_result(store, result)


def _to_json(result: Generated) -> dict[str, Any]:
    outcome = {
        "units_made": result.new_units,
        "units_kept": result.kept_units,
        "failed": result.failed,
        "complete": result.complete,
        "agreement": None if result.agreement is None else result.agreement.to_json(),
    }
    if result.repaired is not None:
        outcome |= {
            "records_restored": len(result.repaired.records),
            "units_made_again": len(result.repaired.units),
            "units_still_broken": dict(Counter(path for path, _ in result.repaired.left)),
        }
    return outcome


def _print_result(store: str, result: Generated) -> None:
    from fkdpipe.common import words

    state = "complete" if result.complete else "other parts are not finished"
    click.echo(
        f"{store}: {words.count(result.new_units, 'unit')} made, {result.kept_units} kept, "
        f"{words.count(len(result.failed), 'image')} left out; {state}."
    )
    if (agreement := result.agreement) is not None:
        click.echo(
            f"The teacher's first choice is the folder's class for {agreement.top1:.1f} % of "
            f"{words.count(agreement.crops, 'crop')} (chance: {agreement.chance:.1f} %)."
        )
    if result.repaired is not None:
        _print_repair(result.repaired)


def _print_repair(repaired: Repaired) -> None:
    from fkdpipe.common import words

    click.echo(
        f"{words.count(len(repaired.records), 'record')} restored, "
        f"{words.count(len(repaired.units), 'unit')} regenerated"
    )
    for path, number in Counter(path for path, _ in repaired.left).items():
        left = words.count(number, "unit")
        click.echo(f"{path}: {left} still damaged; run --repair with the options that made them")


def _print_forecast(f: Forecast, *, as_json: bool) -> None:
    from fkdpipe.common import words

    if as_json:
        terminal.print_json(f.to_json())
        return
    click.echo(
        f"{f.images:,} images x {words.count(f.crops_per_image, 'crop')} "
        f"({words.count(f.rejected, 'file')} rejected), {words.count(f.units, 'unit')}"
    )
    click.echo(f"store   {words.size(f.stored_bytes)}, {f.bytes_per_crop:.1f} bytes per crop")
    click.echo(
        f"time    {words.duration(f.seconds)} for one process at {f.crops_per_s:,.0f} "
        f"crops/s, measured on {f.sampled_crops:,} crops"
    )
    gpu = f", GPU {words.size(f.gpu_bytes)}" if f.gpu_bytes else ""
    click.echo(f"memory  {words.size(f.buffer_bytes)} for the buffers of a unit{gpu}")
