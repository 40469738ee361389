"""One unit in the making: replay, teachers, encode, commit.

Nothing enters but the unit itself and the batch size: not the order of units, not how many
processes there are, not where an earlier run was stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fkdpipe.common.errors import ImagesError
from fkdpipe.common.progress import Advance
from fkdpipe.labelgen import outputs, spool
from fkdpipe.labelgen.plan import RoundPlan
from fkdpipe.networks.features import Basis
from fkdpipe.networks.teachers import Teacher
from fkdpipe.pixels.crops import Crops
from fkdpipe.pixels.replay import Replay, Request, View, refuse_passing
from fkdpipe.storage import rounds, writer
from fkdpipe.storage.store import Part, Store

log = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.1  # of a unit: more looks like a folder that went away, not like broken files
FEW = 10  # broken images that a unit may have whatever its size, though not most of it

Failures = dict[int, tuple[str, str]]  # place within the unit to (code, detail)


@dataclass(frozen=True)
class Unit:
    """A unit of one round.

    Attributes:
        root: folder that keys are relative to. batch: crops per teacher batch.
        before_commit: called before anything is committed; raises when this process must stop.
    """

    store: Store
    root: Path
    plan: RoundPlan
    number: int
    teachers: Sequence[Teacher]
    basis: Basis | None
    device: torch.device
    batch: int
    before_commit: Callable[[], None] = lambda: None

    def make(self, missing: Sequence[Part], replayer: Replay, advance: Advance) -> dict[str, str]:
        """Commit the missing parts; returns key -> reason of images that failed.

        Raises:
            torch.cuda.OutOfMemoryError: nothing of labels or features is committed then.
            ImagesError: too many images cannot be used.
            ReplayError: an image could not be read for a reason that may pass.
        """
        drawn = rounds.crops_of(self.store, self.plan.crops, self.number)
        if self.plan.crops in missing:
            self._commit_crops(drawn)
        taught = [part for part in missing if part.kind != "crops"]
        if not taught:
            return {}
        images_, crops_M = drawn.flip_NM.shape
        known = self._without_crops()
        failures = dict(known)
        with spool.buffers(taught, images_, crops_M) as values:
            for places_B, pixels in _Batches(self, drawn, replayer, failures):
                made = outputs.teach(self.teachers, pixels, outputs.factors(drawn, places_B))
                for part in taught:
                    encoded = outputs.encode_part(part, made, self.teachers, self.basis)
                    for name, rows in encoded.items():
                        array = values[part.path][name]
                        array.reshape(-1, *array.shape[2:])[places_B] = rows
                advance(len(places_B))
            return self._commit(taught, values, failures, known)

    def _commit_crops(self, drawn: Crops) -> None:
        part = self.plan.crops
        values = {} if not part.fields else rounds.values_of(drawn)
        self.before_commit()
        writer.commit_unit(
            self.store,
            part,
            self.number,
            values,
            made={"crops_crc32c": rounds.checksum(drawn)},
        )

    def _without_crops(self) -> Failures:
        """Images that an import brought no crops for."""
        marker = self.store.marker(self.plan.crops, self.number)
        first = self.store.unit_rows(self.number).start
        return {row - first: why for row, why in marker.failed.items()} if marker else {}

    def _commit(
        self, taught: Sequence[Part], values: spool.Buffers, failures: Failures, known: Failures
    ) -> dict[str, str]:
        rows = self.store.unit_rows(self.number)
        count = rows.stop - rows.start
        keys = self.store.images.keys[rows]
        broken = {place: why for place, why in failures.items() if place not in known}
        if len(broken) > max(MAX_FAILED_SHARE * count, min(FEW, count / 2)):
            place, (code, detail) = next(iter(broken.items()))
            raise ImagesError(
                f"{len(broken)} of {count} images of unit {self.number} cannot be used, for "
                f"example {keys[place]}: {code}, {detail}. Is {self.root} the folder this store "
                "was made for, and all of it there?",
                code="wrong-folder",
            )
        made = {
            "batch": self.batch,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
        }
        failed = {rows.start + place: why for place, why in sorted(failures.items())}
        for part in taught:
            self.before_commit()
            writer.commit_unit(
                self.store, part, self.number, values[part.path], failed=failed, made=made
            )
        for place, (code, detail) in failures.items():
            log.warning("%s is left out: %s, %s", keys[place], code, detail)
        return {str(keys[place]): f"{code}: {detail}" for place, (code, detail) in failures.items()}


@dataclass
class _Batches:
    """Teacher batches of exactly `batch` crops, the last one shorter; failed images left out.

    Iterating gives (places image * M + crop within the unit, uint8 pixels of each view on the
    device).
    """

    unit: Unit
    drawn: Crops
    replayer: Replay
    failures: Failures
    places: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __iter__(self) -> Iterator[tuple[np.ndarray, dict[View, torch.Tensor]]]:
        crops_M, batch = self.drawn.flip_NM.shape[1], self.unit.batch
        views = outputs.views_of(self.unit.teachers)
        held: list[list[torch.Tensor]] = [[] for _ in views]
        for pixels in self.replayer.run(self._requests()):
            refuse_passing(pixels)
            taken: np.ndarray = pixels.request.tag  # type: ignore[assignment]
            self.failures |= {int(taken[f.image]): (f.code, f.detail) for f in pixels.failures}
            good = np.setdiff1d(np.arange(len(taken)), [f.image for f in pixels.failures])
            rows = (good[:, None] * crops_M + np.arange(crops_M)).ravel()
            here = (taken[good][:, None] * crops_M + np.arange(crops_M)).ravel()
            self.places = np.concatenate([self.places, here])
            for tensors, view_pixels in zip(held, pixels.views, strict=True):
                whole = len(good) == len(taken)
                tensors.append(view_pixels if whole else view_pixels[torch.from_numpy(rows)])
            while len(self.places) >= batch:
                joined = [torch.cat(t) if len(t) > 1 else t[0] for t in held]
                yield self._give(views, joined, batch)
                held = [[j[batch:]] for j in joined]
        if len(self.places):
            yield self._give(views, [torch.cat(t) for t in held], len(self.places))

    def _give(
        self, views: list[View], joined: list[torch.Tensor], count: int
    ) -> tuple[np.ndarray, dict[View, torch.Tensor]]:
        places, self.places = self.places[:count], self.places[count:]
        device = self.unit.device
        pixels = [pixels[:count].to(device, non_blocking=True) for pixels in joined]
        return places, dict(zip(views, pixels, strict=True))

    def _requests(self) -> Iterator[Request]:
        store = self.unit.store
        rows = store.unit_rows(self.unit.number)
        keys, sizes = store.images.keys[rows], store.images.size_N2[rows]
        usable = np.setdiff1d(np.arange(len(keys)), list(self.failures))
        step = max(1, self.unit.batch // self.drawn.flip_NM.shape[1])
        for first in range(0, len(usable), step):
            some = usable[first : first + step]
            yield Request.of(self.unit.root, keys[some], sizes[some], self.drawn[some], tag=some)
