"""Phase 1: from images, crops and teachers to committed units of labels and features."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fkdpipe.common import words
from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import FkdpipeError
from fkdpipe.common.progress import Advance, Reporter, keeping, silent
from fkdpipe.labelgen import outputs
from fkdpipe.labelgen.agreement import Agreement
from fkdpipe.labelgen.plan import Plan, RoundPlan
from fkdpipe.labelgen.repair import Repaired
from fkdpipe.labelgen.unit import Made, Unit
from fkdpipe.networks.teachers import Teacher
from fkdpipe.pixels import replay
from fkdpipe.pixels.replay import Replay
from fkdpipe.storage import writer
from fkdpipe.storage.claims import Claim
from fkdpipe.storage.store import IMAGES, Part, Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """Resources of a run; none of them is a setting of the store.

    Attributes:
        device: of the teachers. batch: crops per teacher batch. threads: of the replay.
        rank: which units this process makes.
        batch_of: (part path, unit) to the batch size that a unit was made with, for repairs.
    """

    device: torch.device
    batch: int = 64
    threads: int = 2
    rank: Rank = field(default_factory=Rank)
    batch_of: Mapping[tuple[str, int], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Generated:
    """The result of a run.

    Attributes:
        url: of the store. crops_per_image: M, in total.
        new_units: units committed by this run. kept_units: units committed before.
        failed: images without labels, by key, with the reason.
        complete: whether every part is sealed, by all processes together.
        batch_size: crops per teacher batch at the end; smaller than requested if the GPU ran out
            of memory.
        agreement: of the teachers' first choices with the folder's classes, over the crops that
            this run labelled; None if it labelled none, or without classes.
        repaired: the result of a repair.
    """

    url: str
    images: int
    crops_per_image: int
    new_units: int
    kept_units: int
    failed: dict[str, str]
    complete: bool
    batch_size: int
    agreement: Agreement | None = None
    repaired: Repaired | None = None


@dataclass(frozen=True)
class _Todo:
    plan: RoundPlan
    unit: int
    missing: list[Part]
    crops: int


def generate(
    plan: Plan,
    teachers: Sequence[Teacher],
    resources: Resources,
    *,
    reporter: Reporter = silent,
) -> Generated:
    """Make the missing units of this process, and seal the parts that are complete.

    Raises:
        ClaimedError: another process makes these units.
        StoreError: the store cannot be written; everything committed is kept.
        ImagesError: too many images of a unit cannot be read.
        ReplayError: an image could not be read, perhaps temporarily; nothing is recorded.
    """
    store, rank = plan.store, resources.rank
    ours = range(rank.index, store.num_units, rank.world)
    with Claim(store.location, rank.index, rank.world) as claim:
        swept = writer.sweep(store, rank.index, rank.world)
        if swept:
            log.info("removed %d partial files of an interrupted run", swept)
        todo = list(_todo(store, plan, ours))
        kept = len(ours) * len(plan.rounds) - len(todo)
        batch, made = _make(plan, teachers, resources, todo, claim, kept, reporter)
        parts = [store.part(IMAGES), *plan.parts]
        sealed = [writer.seal(store, part) for part in parts]  # those that are complete
    return Generated(
        url=store.url,
        images=store.num_images,
        crops_per_image=sum(round_plan.crops_M for round_plan in plan.rounds),
        new_units=len(todo),
        kept_units=kept,
        failed=made.failed,
        complete=all(sealed),
        batch_size=batch,
        agreement=_checked(made.agreement),
    )


def _checked(agreement: Agreement | None) -> Agreement | None:
    """None if no crop has a class; warns when the agreement is near chance."""
    if agreement is None or not agreement.crops:
        return None
    if agreement.near_chance:
        log.warning(
            "the teacher's first choice is the folder's class for only %.1f %% of the crops; "
            "chance is %.1f %%. Check the order of its outputs (--class-map or --numbered), its "
            "mean, std and size, and its weights, before you train on these labels: `fkdpipe "
            "evaluate` measures it on whole images.",
            agreement.top1,
            agreement.chance,
        )
    return agreement


def _todo(store: Store, plan: Plan, units: range) -> Iterator[_Todo]:
    for round_plan in plan.rounds:
        done = {p.path: writer.committed_units(store, p, units) for p in round_plan.parts}
        for unit in units:
            missing = [part for part in round_plan.parts if unit not in done[part.path]]
            if missing:
                rows = store.unit_rows(unit)
                crops = (rows.stop - rows.start) * round_plan.crops_M
                yield _Todo(round_plan, unit, missing, crops)


def _make(
    plan: Plan,
    teachers: Sequence[Teacher],
    resources: Resources,
    todo: Sequence[_Todo],
    claim: Claim,
    kept: int,
    reporter: Reporter,
) -> tuple[int, Made]:
    """Make units one after the other; also returns the last batch size.

    Args:
        kept: units committed by earlier runs.
    """
    batch, units = resources.batch, kept + len(todo)
    total = Made({}, None)
    with (
        keeping(lambda: words.units_kept(kept, units)),
        reporter.task("teacher", sum(item.crops for item in todo), "crops") as advance,
        replay.open_replay(
            plan.replay,
            outputs.views_of(teachers),
            threads=resources.threads,
            prefetch=max(2, resources.threads),
            device=resources.device,
        ) as replayer,
    ):
        for item in todo:
            recorded = [resources.batch_of.get((p.path, item.unit)) for p in item.missing]
            size = next((b for b in recorded if b), batch)
            unit = Unit(
                plan.store, plan.root, item.plan, item.unit, teachers, plan.basis,
                resources.device, size, claim.check,
            )  # fmt: skip
            used, made = _within_memory(unit, item.missing, replayer, advance)
            batch = min(batch, used) if used < size else batch
            total = total.plus(made)
            kept += 1
    return batch, total


def _within_memory(
    unit: Unit, missing: Sequence[Part], replayer: Replay, advance: Advance
) -> tuple[int, Made]:
    """Make a unit; if the GPU runs out of memory, try again with half the batch size."""
    while True:
        done = 0

        def count(crops: int) -> None:
            nonlocal done
            done += crops
            advance(crops)

        try:
            return unit.batch, unit.make(missing, replayer, count)
        except torch.cuda.OutOfMemoryError as error:
            if unit.batch == 1:
                raise FkdpipeError(
                    "the GPU has too little memory for a teacher batch of one crop. Use "
                    "--precision bfloat16 or another device.",
                    code="out-of-memory",
                ) from error
            half = unit.batch // 2
            log.warning(
                "out of GPU memory: from unit %d on, a teacher batch has %d crops instead of %d",
                unit.number,
                half,
                unit.batch,
            )
            advance(-done)
            missing = [p for p in missing if unit.store.marker(p, unit.number) is None]
            unit = replace(unit, batch=half)
        torch.cuda.empty_cache()
