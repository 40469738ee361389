"""Run the teacher again on a sample of a store and compare its outputs with the stored ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fkdpipe.common.errors import DamagedStoreError, ModelError, StoreMismatchError
from fkdpipe.labelgen import outputs
from fkdpipe.networks import teachers as teachers_
from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.networks.features import Basis
from fkdpipe.networks.teachers import Teacher
from fkdpipe.pixels import images, replay
from fkdpipe.pixels.crops import Crops
from fkdpipe.pixels.replay import Request
from fkdpipe.storage import features, labels, rounds, schema
from fkdpipe.storage.labels import Form, Target
from fkdpipe.storage.store import Part, Store
from fkdpipe.storage.verify import Problem

# How much a label may differ beyond its form's error bound, since its batch is not the one it was
# made in: the last bits of float32, and far more if the teacher computes in 16 bits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True)
class Checked:
    """The comparison of a sample of a part.

    Attributes:
        crops: number of crops compared.
        worst: largest difference. For labels, the total variation, or the probability that a kept
            class lacks to one that should have been kept; for features, the largest error as a
            fraction of the vector's largest value.
        allowed: error bound of the stored form plus the tolerance of the precision.
    """

    part: str
    crops: int
    worst: float
    allowed: float
    problems: tuple[Problem, ...]


def folder(store: Store, data: Path) -> list[Problem]:
    """Compare the image folder with the store's list: what is missing, changed or new."""
    listed = store.images
    scanned = images.scan(data, need_classes=False)
    ours = dict(zip(listed.keys.tolist(), listed.bytes_N.tolist(), strict=True))
    theirs = dict(zip(scanned.keys, scanned.bytes_N.tolist(), strict=True))
    problems = []
    for code, keys in (
        ("image-missing", sorted(ours.keys() - theirs.keys())),
        ("image-extra", sorted(theirs.keys() - ours.keys())),
        ("image-changed", sorted(k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k])),
    ):
        problems += [Problem(code, "images", -1, key) for key in keys[:100]]
        if len(keys) > 100:
            problems.append(Problem(code, "images", -1, f"and {len(keys) - 100} more"))
    return problems


def other_teachers(part: Part, teachers: Sequence[Teacher]) -> list[str]:
    """How these teachers differ from those that made a part; empty if they are the same."""
    ours = [t.facts() for t in teachers]
    return schema.differences({"teachers": list(part.settings.teachers)}, {"teachers": ours})


def check_basis(part: Part, basis: Basis | None) -> None:
    """Refuse a basis other than the one a part's features were made with.

    Raises:
        StoreMismatchError: it is another basis, or a basis is needed and there is none.
    """
    recorded = part.settings.basis if part.kind == "features" else None
    if recorded is None or (basis is not None and basis.digest == recorded):
        return
    if basis is None:
        problem = f"{part.path} holds components of a basis (digest {recorded[:12]})."
    else:
        problem = (
            f"{part.path}: the basis with digest {basis.digest[:12]} is not the one that the "
            f"store's features were made with (digest {recorded[:12]})."
        )
    raise StoreMismatchError(f"{problem} Name its file with --basis FILE.", code="other-basis")


def parts_of(store: Store, source: str | None, names: Sequence[str]) -> list[Part]:
    """Labels and features of a source made by teachers of these names; all, if they made none.

    Raises:
        ModelError: the source has no labels or features.
    """
    parts = [part for part in store.parts.values() if part.kind in ("labels", "features")]
    parts = [part for part in parts if source in (None, part.source)]
    if not parts:
        raise ModelError(f"{store.url} has no labels or features of {source or 'any source'}.")
    theirs = [part for part in parts if [t["name"] for t in part.settings.teachers] == list(names)]
    return theirs or parts


def all_parts(
    store: Store,
    parts: Sequence[Part],
    data: Path,
    teachers: Sequence[Teacher],
    *,
    device: torch.device,
    basis: Basis | None = None,
    sample: int = 32,
) -> list[Checked]:
    """`teacher` for every part that these teachers made; if they made none, a problem for each.

    Raises:
        StoreMismatchError: as `teacher`.
    """
    differences = {part.path: other_teachers(part, teachers) for part in parts}
    theirs = [part for part in parts if not differences[part.path]]
    if not theirs:
        problems = [
            Problem("teacher-differs", path, -1, f"made by other teachers: {'; '.join(lines)}")
            for path, lines in differences.items()
        ]
        return [Checked(each.part, 0, 0.0, 0.0, (each,)) for each in problems]
    return [
        teacher(store, part, data, teachers, device=device, basis=basis, sample=sample)
        for part in theirs
    ]


def teacher(
    store: Store,
    part: Part,
    data: Path,
    teachers: Sequence[Teacher],
    *,
    device: torch.device,
    basis: Basis | None = None,
    sample: int = 32,
    threads: int = 2,
) -> Checked:
    """Run the teachers again on some crops of a part and compare.

    Args:
        sample: number of crops to compare, drawn from the whole part; every call draws the same.

    Raises:
        StoreMismatchError: the part was made by other teachers, or with another basis.
    """
    check_basis(part, basis)
    changed = other_teachers(part, teachers)
    if changed:
        raise StoreMismatchError(
            f"{part.path} was made by other teachers: {'; '.join(changed)}.", code="settings"
        )
    allowed = _allowed(part) + TOLERANCE[part.settings.precision]
    worst, seen = 0.0, 0
    problems = []
    root = images.split_root(data, "train")
    views = outputs.views_of(teachers)
    with replay.open_replay(
        part.settings.replay, views, threads=threads, device=device
    ) as replayer:
        for unit, row_B, crop_B in _positions(store, part, sample):
            try:
                request, recorded = _request(store, part, root, unit, row_B, crop_B)
                stored = _stored(store, part, unit, row_B, crop_B)
            except DamagedStoreError as error:
                problems.append(Problem("checksum", part.path, unit, str(error)))
                continue
            (pixels,) = replayer.run([request])
            inputs = dict(zip(views, (p.to(device) for p in pixels.views), strict=True))
            index_B = (row_B - store.unit_rows(unit).start) * recorded.flip_NM.shape[1] + crop_B
            results = outputs.teach(teachers, inputs, outputs.factors(recorded, index_B))
            difference_B = _difference(part, stored, results, teachers, basis)
            seen += len(difference_B)
            worst = max(worst, float(difference_B.max()))
            bad = int((difference_B > allowed).sum())
            if bad:
                detail = f"{bad} of {len(difference_B)} crops differ by up to "
                detail += f"{difference_B.max():.3g}"
                problems.append(Problem("teacher-differs", part.path, unit, detail))
    return Checked(part.path, seen, worst, allowed, tuple(problems))


def _allowed(part: Part) -> float:
    if part.kind == "features":
        return features.error_bound(part.settings.code)
    return labels.error_bound(part.settings.form, part.settings.classes)


def _positions(
    store: Store, part: Part, sample: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(unit, rows of the store, their crops) of a random sample of all labelled crops."""
    labelled = np.zeros(store.num_images, dtype=bool)
    for unit, marker in store.markers(part):
        if marker is not None:
            labelled[store.unit_rows(unit)] = True
            labelled[list(marker.failed)] = False
    good, crops_M = np.flatnonzero(labelled), part.settings.crops
    total = len(good) * crops_M
    chosen = np.random.default_rng(0).choice(total, min(sample, total), replace=False)
    row_B, crop_B = np.divmod(np.sort(chosen), crops_M)
    row_B = good[row_B]
    unit_B = row_B // store.unit_size
    for unit in np.unique(unit_B).tolist():
        yield unit, row_B[unit_B == unit], crop_B[unit_B == unit]


def _request(
    store: Store, part: Part, root: Path, unit: int, row_B: np.ndarray, crop_B: np.ndarray
) -> tuple[Request, Crops]:
    """A request for one crop of each row, and all crops of the unit."""
    crops_part = next(p for p in store.rounds() if p.round == part.round)
    recorded = rounds.crops_of(store, crops_part, unit)
    local_B = row_B - store.unit_rows(unit).start
    one_each = recorded[local_B[:, None], crop_B[:, None]]
    listed = store.images
    return Request.of(root, listed.keys[row_B], listed.size_N2[row_B], one_each), recorded


def _stored(
    store: Store, part: Part, unit: int, row_B: np.ndarray, crop_B: np.ndarray
) -> dict[str, np.ndarray]:
    """(B, ...) stored values of each field."""
    local_B = row_B - store.unit_rows(unit).start
    crops_m, column_B = np.unique(crop_B, return_inverse=True)
    names = [field.name for field in part.fields]
    return {name: store.read(part, name, unit, crops_m)[local_B, column_B] for name in names}


def _difference(
    part: Part,
    stored: dict[str, np.ndarray],
    results: Sequence[Outputs],
    teachers: Sequence[Teacher],
    basis: Basis | None,
) -> np.ndarray:
    if part.kind == "labels":
        form = part.settings.form
        temperature = 1.0 if form.kind == "logits" else part.settings.temperature
        shares = [t.weight for t in teachers]
        log_prob_BC = teachers_.average([each.logits for each in results], shares, temperature)
        return label_difference(form, stored, log_prob_BC.exp().cpu().numpy())
    fresh = outputs.encode_part(part, results, teachers, basis)
    a, b = (features.decode(part.settings.code, values) for values in (stored, fresh))
    scale = np.abs(b).max(axis=1)
    return np.abs(a - b).max(axis=1) / np.maximum(scale, 1e-12)


def label_difference(form: Form, stored: dict[str, np.ndarray], prob_BC: np.ndarray) -> np.ndarray:
    """Distance of stored labels from a teacher's probabilities, float (B,).

    For kept classes it covers their probabilities, and how much less probable they are than the
    classes that should have been kept: of two almost equally probable classes, either may be kept.
    """
    if not form.sparse:
        kept_BC = labels.softmax(stored[form.value_field])
        return 0.5 * np.abs(kept_BC - prob_BC).sum(axis=1)
    classes = prob_BC.shape[1]
    known_B = (stored["ids"] < classes).all(axis=1)
    ids_BK = np.minimum(stored["ids"], classes - 1).astype(np.int64)
    exact_BK = np.take_along_axis(prob_BC, ids_BK, axis=1)
    best_BC = -np.sort(-prob_BC, axis=1)
    difference_B = np.maximum(
        best_BC[:, 0] - exact_BK[:, 0], best_BC[:, form.k - 1] - exact_BK.min(axis=1)
    )
    if form.kind == "topk":
        prob_BK = labels.decode_probabilities(form, stored[form.value_field])
        target = Target("marginal-smoothing", form.k)
        a, b = (
            labels.to_dense(labels.sparse_target(target, ids_BK, each, classes), classes)
            for each in (prob_BK, exact_BK)
        )
        difference_B = np.maximum(difference_B, 0.5 * np.abs(a - b).sum(axis=1))
    return np.where(known_B, difference_B, 1.0)
