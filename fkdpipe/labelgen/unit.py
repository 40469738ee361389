"""Make one unit: replay, run the teachers, encode, commit.

The result depends only on the unit and the batch size, not on the order of units, the number of
processes or where an earlier run was interrupted.
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
from fkdpipe.labelgen.agreement import Agreement
from fkdpipe.labelgen.plan import RoundPlan
from fkdpipe.networks.features import Basis
from fkdpipe.networks.models import SELF_SUPERVISED
from fkdpipe.networks.teachers import Teacher
from fkdpipe.pixels.crops import Crops
from fkdpipe.pixels.replay import Replay, Request, View, refuse_passing
from fkdpipe.storage import rounds, writer
from fkdpipe.storage.store import Part, Store

log = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.1  # of a unit: more looks like a missing folder, not like broken files
FEW = 10  # broken images that a unit of any size may have, up to half of its images

Failures = dict[int, tuple[str, str]]  # position within the unit to (code, detail)


@dataclass(frozen=True)
class Made:
    """What a unit's making found.

    Attributes:
        failed: key to reason, of images without labels.
        agreement: of the teachers' first choices with the folder's classes; None without labels.
    """

    failed: dict[str, str]
    agreement: Agreement | None

    def plus(self, other: Made) -> Made:
        agreement = self.agreement.plus(other.agreement) if self.agreement else other.agreement
        return Made(self.failed | other.failed, agreement)


@dataclass(frozen=True)
class Unit:
    """A unit of one round.

    Attributes:
        root: folder that keys are relative to. batch: crops per teacher batch.
        before_commit: called before every commit; raises if this process must stop.
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

    def make(self, missing: Sequence[Part], replayer: Replay, advance: Advance) -> Made:
        """Commit the missing parts.

        Raises:
            torch.cuda.OutOfMemoryError: no labels or features of the unit are committed.
            ImagesError: too many images cannot be used.
            ReplayError: an image could not be read, perhaps temporarily.
        """
        recorded = rounds.crops_of(self.store, self.plan.crops, self.number)
        if self.plan.crops in missing:
            self._commit_crops(recorded)
        parts = [part for part in missing if part.kind != "crops"]
        if not parts:
            return Made({}, None)
        images_, crops_M = recorded.flip_NM.shape
        known = self._without_crops()
        failures = dict(known)
        agreement: Agreement | None = None
        with spool.buffers(parts, images_, crops_M) as values:
            for index_B, pixels in _Batches(self, recorded, replayer, failures):
                factors = outputs.factors(recorded, index_B)
                results = outputs.teach(self.teachers, pixels, factors)
                for part in parts:
                    encoded = outputs.encode_part(part, results, self.teachers, self.basis)
                    for name, rows in encoded.items():
                        array = values[part.path][name]
                        array.reshape(-1, *array.shape[2:])[index_B] = rows
                    if part.kind == "labels" and self._classes_are_outputs:
                        chosen_B = outputs.first_choices(part.settings.form, encoded)
                        class_B = self._class_N[index_B // crops_M]
                        counted = Agreement.of(chosen_B, class_B, part.settings.classes)
                        agreement = counted.plus(agreement)
                advance(len(index_B))
            return Made(self._commit(parts, values, failures, known), agreement)

    @property
    def _classes_are_outputs(self) -> bool:
        return not any(t.spec.library in SELF_SUPERVISED for t in self.teachers)

    @property
    def _class_N(self) -> np.ndarray:
        return self.store.images.class_N[self.store.unit_rows(self.number)]

    def _commit_crops(self, recorded: Crops) -> None:
        part = self.plan.crops
        values = {} if not part.fields else rounds.values_of(recorded)
        self.before_commit()
        writer.commit_unit(
            self.store,
            part,
            self.number,
            values,
            facts={"crops_crc32c": rounds.checksum(recorded)},
        )

    def _without_crops(self) -> Failures:
        """Images that an import had no crops for."""
        marker = self.store.marker(self.plan.crops, self.number)
        first = self.store.unit_rows(self.number).start
        return {row - first: why for row, why in marker.failed.items()} if marker else {}

    def _commit(
        self, parts: Sequence[Part], values: spool.Buffers, failures: Failures, known: Failures
    ) -> dict[str, str]:
        rows = self.store.unit_rows(self.number)
        count = rows.stop - rows.start
        keys = self.store.images.keys[rows]
        broken = {position: why for position, why in failures.items() if position not in known}
        if len(broken) > max(MAX_FAILED_SHARE * count, min(FEW, count / 2)):
            position, (code, detail) = next(iter(broken.items()))
            raise ImagesError(
                f"{len(broken)} of {count} images of unit {self.number} cannot be used, for "
                f"example {keys[position]}: {code}, {detail}. Check that {self.root} is complete "
                "and the folder this store was made for.",
                code="wrong-folder",
            )
        facts = {
            "batch": self.batch,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
        }
        failed = {rows.start + position: why for position, why in sorted(failures.items())}
        for part in parts:
            self.before_commit()
            writer.commit_unit(
                self.store, part, self.number, values[part.path], failed=failed, facts=facts
            )
        for position, (code, detail) in failures.items():
            log.warning("%s is left out: %s, %s", keys[position], code, detail)
        return {str(keys[k]): f"{code}: {detail}" for k, (code, detail) in failures.items()}


@dataclass
class _Batches:
    """Teacher batches of exactly `batch` crops, except for the last one, without failed images.

    Yields (index image * M + crop within the unit, uint8 pixels of each view on the device).
    """

    unit: Unit
    crops: Crops
    replayer: Replay
    failures: Failures
    pending: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __iter__(self) -> Iterator[tuple[np.ndarray, dict[View, torch.Tensor]]]:
        crops_M, batch = self.crops.flip_NM.shape[1], self.unit.batch
        views = outputs.views_of(self.unit.teachers)
        held: list[list[torch.Tensor]] = [[] for _ in views]
        for pixels in self.replayer.run(self._requests()):
            refuse_passing(pixels)
            images: np.ndarray = pixels.request.tag  # type: ignore[assignment]
            self.failures |= {int(images[f.image]): (f.code, f.detail) for f in pixels.failures}
            good = np.setdiff1d(np.arange(len(images)), [f.image for f in pixels.failures])
            rows = (good[:, None] * crops_M + np.arange(crops_M)).ravel()
            index = (images[good][:, None] * crops_M + np.arange(crops_M)).ravel()
            self.pending = np.concatenate([self.pending, index])
            for tensors, view_pixels in zip(held, pixels.views, strict=True):
                whole = len(good) == len(images)
                tensors.append(view_pixels if whole else view_pixels[torch.from_numpy(rows)])
            while len(self.pending) >= batch:
                joined = [torch.cat(t) if len(t) > 1 else t[0] for t in held]
                yield self._take(views, joined, batch)
                held = [[j[batch:]] for j in joined]
        if len(self.pending):
            yield self._take(views, [torch.cat(t) for t in held], len(self.pending))

    def _take(
        self, views: list[View], joined: list[torch.Tensor], count: int
    ) -> tuple[np.ndarray, dict[View, torch.Tensor]]:
        index_B, self.pending = self.pending[:count], self.pending[count:]
        device = self.unit.device
        pixels = [pixels[:count].to(device, non_blocking=True) for pixels in joined]
        return index_B, dict(zip(views, pixels, strict=True))

    def _requests(self) -> Iterator[Request]:
        store = self.unit.store
        rows = store.unit_rows(self.unit.number)
        keys, sizes = store.images.keys[rows], store.images.size_N2[rows]
        usable = np.setdiff1d(np.arange(len(keys)), list(self.failures))
        step = max(1, self.unit.batch // self.crops.flip_NM.shape[1])
        for first in range(0, len(usable), step):
            some = usable[first : first + step]
            yield Request.of(self.unit.root, keys[some], sizes[some], self.crops[some], tag=some)
