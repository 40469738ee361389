"""The teacher run again on a sample of a store: are these the labels of these crops?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fkdpipe import images, replay
from fkdpipe.errors import StoreMismatchError
from fkdpipe.features import Basis
from fkdpipe.labelgen import outputs
from fkdpipe.replay import Request
from fkdpipe.storage import features, labels, rounds, schema
from fkdpipe.storage.labels import Form
from fkdpipe.storage.store import Part, Store
from fkdpipe.storage.verify import Problem
from fkdpipe.teachers import Teacher

# What a label may differ by beyond its form's bound, since batches are composed otherwise than
# when it was made: last bits of float32, and far more where the teacher computes in 16 bits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True)
class Checked:
    """How a sample of a part compared.

    Attributes:
        crops: looked at. worst: largest difference: total variation of labels; of features the
            largest error as a share of the vector's largest value.
        allowed: bound of the stored form plus the tolerance of the precision.
    """

    part: str
    crops: int
    worst: float
    allowed: float
    problems: tuple[Problem, ...]


def folder(store: Store, data: Path) -> list[Problem]:
    """The image folder against the store's list: what is missing, changed or new."""
    listed = store.images
    found = images.scan(data, need_classes=False)
    ours = dict(zip(listed.keys.tolist(), listed.bytes_N.tolist(), strict=True))
    theirs = dict(zip(found.keys, found.bytes_N.tolist(), strict=True))
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
        sample: images looked at, spread over the units. Up to four crops of each.

    Raises:
        StoreMismatchError: the part was made by other teachers.
    """
    ours = [t.facts() for t in teachers]
    changed = schema.differences({"teachers": part.settings["teachers"]}, {"teachers": ours})
    if changed:
        raise StoreMismatchError(
            f"{part.path} was made by other teachers: {'; '.join(changed)}.", code="settings"
        )
    precision = part.settings["precision"]
    allowed = _allowed(part) + TOLERANCE[precision]
    worst, seen = 0.0, 0
    problems = []
    for unit, difference_B in _compare(store, part, data, teachers, device, basis, sample, threads):
        seen += len(difference_B)
        if not len(difference_B):
            continue
        worst = max(worst, float(difference_B.max()))
        bad = int((difference_B > allowed).sum())
        if bad:
            detail = f"{bad} of {len(difference_B)} crops differ by up to {difference_B.max():.3g}"
            problems.append(Problem("teacher-differs", part.path, unit, detail))
    return Checked(part.path, seen, worst, allowed, tuple(problems))


def _allowed(part: Part) -> float:
    if part.kind == "features":
        return features.error_bound(part.settings["code"])
    form = labels.parse_form(part.settings["form"])
    return labels.error_bound(form, int(part.settings["classes"]))


def _compare(
    store: Store,
    part: Part,
    data: Path,
    teachers: Sequence[Teacher],
    device: torch.device,
    basis: Basis | None,
    sample: int,
    threads: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """(unit, difference of each crop looked at)."""
    root = images.split_root(data, "train")
    views = outputs.views_of(teachers)
    crops_part = next(p for p in store.rounds() if p.round == part.round)
    per_unit = math.ceil(sample / store.num_units)
    backend = part.settings["replay"]
    with replay.open_replay(backend, views, threads=threads, device=device) as replayer:
        for unit, marker in store.markers(part):
            if marker is None:
                continue
            rows = store.unit_rows(unit)
            good = np.setdiff1d(np.arange(rows.start, rows.stop), list(marker.failed))[:per_unit]
            drawn = rounds.crops_of(store, crops_part, unit)
            which = np.arange(min(4, drawn.flip_NM.shape[1]))
            local = good - rows.start
            request = Request(
                paths=[images.path_of(root, key) for key in store.images.keys[good]],
                size_I2=store.images.size_N2[good],
                box_Im4=drawn.box_NM4[local][:, which],
                flip_Im=drawn.flip_NM[local][:, which],
            )
            (pixels,) = replayer.run([request])
            seen = dict(zip(views, (p.to(device) for p in pixels.views), strict=True))
            places_B = (local[:, None] * drawn.flip_NM.shape[1] + which).ravel()
            made = outputs.teach(teachers, seen, outputs.factors(drawn, places_B))
            fresh = outputs.encode_part(part, made, teachers, basis)
            stored = {
                name: _stored(store, part, marker.files, unit, name, local, which) for name in fresh
            }
            yield unit, _difference(part, stored, fresh)


def _stored(
    store: Store,
    part: Part,
    files: dict,
    unit: int,
    name: str,
    local: np.ndarray,
    which: np.ndarray,
) -> np.ndarray:
    prefix = f"{part.path}/{name}/c/{unit}/"
    shards = {k: store.read_checked(k, files, unit) for k in files if k.startswith(prefix)}
    whole = store.arrays.decode(f"{part.path}/{name}", (store.unit_rows(unit),), shards)
    taken = whole[local][:, which]
    return taken.reshape(-1, *taken.shape[2:])


def _difference(part: Part, stored: dict, fresh: dict) -> np.ndarray:
    if part.kind == "features":
        code = part.settings["code"]
        a, b = (features.decode(code, values) for values in (stored, fresh))
        scale = np.abs(b).max(axis=1)
        return np.abs(a - b).max(axis=1) / np.maximum(scale, 1e-12)
    form, classes = labels.parse_form(part.settings["form"]), int(part.settings["classes"])
    a, b = (_dense(form, values, classes) for values in (stored, fresh))
    return 0.5 * np.abs(a - b).sum(axis=1)


def _dense(form: Form, values: dict, classes: int) -> np.ndarray:
    if not form.sparse:
        return labels.softmax(values["log_prob" if form.kind == "full" else "logit"])
    if form.kind == "hard":
        return labels.to_dense(
            labels.sparse_target(labels.Target("hard"), values["ids"], values["ids"], classes),
            classes,
        )
    prob = labels.decode_probabilities(form, values["stick" if form.compact else "prob"])
    target = labels.Target("marginal-smoothing", form.k)
    return labels.to_dense(labels.sparse_target(target, values["ids"], prob, classes), classes)
