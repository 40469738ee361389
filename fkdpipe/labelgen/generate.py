"""Phase 1: images + crops + teachers -> committed units of labels.

A unit is made by one process from beginning to end: its crops are drawn from the seed, replayed,
shown to the teachers in batches that never cross units, encoded and committed. What makes labels
byte-identical on one machine is that nothing else enters: not the order of units, not how many
processes there are, not where an earlier run was stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fkdpipe import images, replay
from fkdpipe.crops import Crops
from fkdpipe.distributed import Rank
from fkdpipe.errors import ImagesError
from fkdpipe.labelgen import outputs
from fkdpipe.labelgen.plan import Plan, RoundPlan
from fkdpipe.progress import Advance, Reporter, silent
from fkdpipe.replay import Replay, Request, View
from fkdpipe.storage import rounds, writer
from fkdpipe.storage.labels import parse_form
from fkdpipe.storage.store import Part, Store
from fkdpipe.teachers import Teacher

log = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.5  # of a unit: more looks like the wrong folder, not like broken files


@dataclass(frozen=True)
class Resources:
    """What a run may use; nothing here is a setting of the store.

    Attributes:
        device: of the teachers. batch: crops per teacher batch. threads: of the replay.
        rank: which units are ours.
    """

    device: torch.device
    batch: int = 64
    threads: int = 2
    rank: Rank = field(default_factory=Rank)


@dataclass(frozen=True)
class Result:
    """What a run did.

    Attributes:
        made: units committed now. kept: units of ours that were committed before.
        failed: images without labels, by key, with the reason.
        sealed: True when every part is complete, all processes taken together.
    """

    made: int
    kept: int
    failed: dict[str, str]
    sealed: bool


def generate(
    plan: Plan,
    teachers: Sequence[Teacher],
    resources: Resources,
    *,
    reporter: Reporter = silent,
) -> Result:
    """Make every unit of ours that is missing, and seal what is complete.

    Raises:
        StoreError: the store cannot be written; everything committed is kept.
        ImagesError: most images of a unit cannot be read.
    """
    store = plan.store
    ours = range(resources.rank.index, store.num_units, resources.rank.world)
    todo = [
        (round_plan, unit, missing)
        for round_plan in plan.rounds
        for unit, missing in _missing(store, round_plan, ours)
    ]
    kept = len(ours) * len(plan.rounds) - len(todo)
    failed: dict[str, str] = {}
    total = sum(_crops_in(store, round_plan, unit) for round_plan, unit, _ in todo)
    views = outputs.views_of(teachers)
    with (
        reporter.task("teacher", total, "crops") as advance,
        replay.open_replay(
            plan.replay,
            views,
            threads=resources.threads,
            prefetch=max(2, resources.threads),
            device=resources.device,
        ) as replayer,
    ):
        for round_plan, unit, missing in todo:
            job = _Unit(store, plan.root, round_plan, unit, resources)
            failed |= job.make(missing, teachers, replayer, views, advance)
    sealed = all(writer.seal(store, part) for part in plan.parts)
    return Result(len(todo), kept, failed, sealed)


def _missing(store: Store, plan: RoundPlan, units: range) -> Iterator[tuple[int, list[Part]]]:
    done = {part.path: writer.committed_units(store, part, units) for part in plan.parts}
    for unit in units:
        missing = [part for part in plan.parts if unit not in done[part.path]]
        if missing:
            yield unit, missing


def _crops_in(store: Store, plan: RoundPlan, unit: int) -> int:
    rows = store.unit_rows(unit)
    return (rows.stop - rows.start) * plan.crops_M


@dataclass(frozen=True)
class _Unit:
    """One unit of one round in the making."""

    store: Store
    root: Path
    plan: RoundPlan
    unit: int
    resources: Resources

    def make(
        self,
        missing: list[Part],
        teachers: Sequence[Teacher],
        replayer: Replay,
        views: Sequence[View],
        advance: Advance,
    ) -> dict[str, str]:
        """Commit the missing parts; returns key -> reason of images that failed."""
        drawn = rounds.crops_of(self.store, self.plan.crops, self.unit)
        if self.plan.crops in missing:
            self._commit_crops(drawn)
        taught = [part for part in missing if part.kind != "crops"]
        if not taught:
            return {}
        values = {
            part.path: {f.name: writer.fill_rows(f, *drawn.box_NM4.shape[:2]) for f in part.fields}
            for part in taught
        }
        failures: dict[int, tuple[str, str]] = {}
        for crops_B, pixels in self._batches(drawn, replayer, views, failures):
            on_device = {
                view: p.to(self.resources.device, non_blocking=True) for view, p in pixels.items()
            }
            logits = outputs.teacher_logits(teachers, on_device)
            for part in taught:
                self._encode(part, logits, teachers, values[part.path], crops_B)
            advance(len(crops_B))
        return self._commit(taught, values, failures)

    def _commit_crops(self, drawn: Crops) -> None:
        part = self.plan.crops
        values = {} if not part.fields else {"box": drawn.box_NM4, "flip": drawn.flip_NM}
        made = {"crops_crc32c": rounds.checksum(drawn)}
        writer.commit_unit(self.store, part, self.unit, values, made=made)

    def _encode(
        self,
        part: Part,
        logits: list[torch.Tensor],
        teachers: Sequence[Teacher],
        values: dict[str, np.ndarray],
        crops_B: np.ndarray,
    ) -> None:
        """Put the fields of a batch at their places; crops_B counts image * M + crop."""
        form = parse_form(part.settings["form"])
        shares = [teacher.weight for teacher in teachers]
        encoded = outputs.encode(form, logits, shares, float(part.settings["temperature"]))
        for name, rows in encoded.items():
            flat = values[name].reshape(-1, *values[name].shape[2:])
            flat[crops_B] = rows

    def _commit(
        self,
        taught: list[Part],
        values: dict[str, dict[str, np.ndarray]],
        failures: dict[int, tuple[str, str]],
    ) -> dict[str, str]:
        rows = self.store.unit_rows(self.unit)
        count = rows.stop - rows.start
        keys = self.store.images.keys[rows]
        if len(failures) > MAX_FAILED_SHARE * count:
            place, (code, detail) = next(iter(failures.items()))
            raise ImagesError(
                f"{len(failures)} of {count} images of unit {self.unit} cannot be used, for "
                f"example {keys[place]}: {code}, {detail}. Is {self.root} the folder this store "
                "was made for?",
                code="wrong-folder",
            )
        made = {
            "batch": self.resources.batch,
            "device": self.resources.device.type,
            "threads": torch.get_num_threads(),
        }
        failed = {rows.start + place: why for place, why in sorted(failures.items())}
        for part in taught:
            writer.commit_unit(
                self.store, part, self.unit, values[part.path], failed=failed, made=made
            )
        for place, (code, detail) in failures.items():
            log.warning("%s is left out: %s, %s", keys[place], code, detail)
        return {str(keys[place]): f"{code}: {detail}" for place, (code, detail) in failures.items()}

    def _batches(
        self,
        drawn: Crops,
        replayer: Replay,
        views: Sequence[View],
        failures: dict[int, tuple[str, str]],
    ) -> Iterator[tuple[np.ndarray, dict[View, torch.Tensor]]]:
        """Teacher batches of exactly `batch` crops, the last one shorter; failed images left out.

        Yields:
            (places image * M + crop within the unit, uint8 pixels of each view).
        """
        crops_M = self.plan.crops_M
        batch = self.resources.batch
        places = np.empty(0, dtype=np.int64)
        held: list[list[torch.Tensor]] = [[] for _ in views]
        for pixels in replayer.run(self._requests(drawn)):
            first: int = pixels.request.tag  # type: ignore[assignment]
            bad = {failure.image for failure in pixels.failures}
            failures |= {first + f.image: (f.code, f.detail) for f in pixels.failures}
            good = [k for k in range(len(pixels.request.paths)) if k not in bad]
            rows = (np.array(good, dtype=np.int64)[:, None] * crops_M + np.arange(crops_M)).ravel()
            places = np.concatenate([places, first * crops_M + rows])
            for tensors, view_pixels in zip(held, pixels.views, strict=True):
                tensors.append(view_pixels if not bad else view_pixels[torch.from_numpy(rows)])
            while len(places) >= batch:
                joined = [torch.cat(t) if len(t) > 1 else t[0] for t in held]
                yield places[:batch], dict(zip(views, (j[:batch] for j in joined), strict=True))
                places = places[batch:]
                held = [[j[batch:]] for j in joined]
        if len(places):
            yield places, dict(zip(views, (torch.cat(t) for t in held), strict=True))

    def _requests(self, drawn: Crops) -> Iterator[Request]:
        rows = self.store.unit_rows(self.unit)
        keys, sizes = self.store.images.keys[rows], self.store.images.size_N2[rows]
        step = max(1, self.resources.batch // self.plan.crops_M)
        for first in range(0, len(keys), step):
            some = slice(first, first + step)
            yield Request(
                paths=[images.path_of(self.root, key) for key in keys[some]],
                size_I2=sizes[some],
                box_Im4=drawn.box_NM4[some],
                flip_Im=drawn.flip_NM[some],
                tag=first,
            )
