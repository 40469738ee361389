"""Estimate what a planned store takes: bytes, hours, read bandwidth, memory.

Boxes, flips, `full`, `logits` and features do not depend on the teacher. Kept classes and their
probabilities do: `MEASURED` are the sizes of stores with simulated labels of a 1,000-class teacher
(1,024 images x 200 crops; median largest probability 0.72, top-5 mass 0.87, entropy 1.6 nats, 6.9
different top classes per image). Labels of a more confident teacher take less space, labels that
vary more between crops take more; expect up to 30 % either way. The size of `ids` also depends on
the number of classes (`BY_CLASSES`, measured in the same way at K = 10); that of the probabilities
hardly does.

Letters: N images, M crops of each, C classes, K kept classes, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fkdpipe.common.errors import UsageError
from fkdpipe.storage import features, labels, schema
from fkdpipe.storage.features import Code
from fkdpipe.storage.labels import Form

# Bytes per crop of ids, prob (float16) and stick (one byte, before compression) by K.
MEASURED = {
    1: (0.36, 1.51, 0.90),
    2: (0.82, 3.23, 1.89),
    3: (1.23, 4.98, 2.87),
    5: (2.80, 8.53, 4.63),
    10: (6.50, 17.16, 8.32),
    20: (13.13, 33.41, 14.81),
    50: (31.26, 84.54, 31.37),
    100: (56.25, 166.30, 57.77),
}
BY_CLASSES = {100: 0.66, 1000: 1.0, 10_000: 1.7}  # factor on the bytes of ids
BOX_BYTES, FLIP_BYTES, SCALE_BYTES = 4.38, 0.14, 3.6
IMAGE_BYTES = 25  # of an image in the list, and its share of the records of a unit
FIXED_BYTES = 30_000  # zarr.json files and their copies in the records


@dataclass(frozen=True)
class Features:
    """Feature vectors to store; written `D`, `D:float16` or `D:int8`."""

    dims: int
    code: Code = "float16"

    def __str__(self) -> str:
        return f"features {self.dims}:{self.code}"


def parse_features(text: str) -> Features:
    """Parse feature vectors to store; raises UsageError that states the syntax."""
    dims, colon, code = text.partition(":")
    code = code if colon else "float16"
    if dims.isdigit() and int(dims) > 0 and code in ("float16", "int8"):
        return Features(int(dims), code)  # type: ignore[arg-type]
    raise UsageError(f"{text!r}: write features as D, D:float16 or D:int8 (for example 512:int8).")


@dataclass(frozen=True)
class Wanted:
    """A store to plan.

    Attributes:
        forms: each is planned as a separate store.
        features: stored beside the labels in each of them.
        teacher_throughput: crops/s that all machines label together.
        train_throughput: crops/s that training consumes on one node.
        derived_boxes: store the seed instead of boxes and flips.
    """

    images: int
    crops: int
    classes: int
    forms: tuple[Form, ...]
    features: tuple[Features, ...] = ()
    teacher_throughput: float | None = None
    train_throughput: float | None = None
    derived_boxes: bool = False

    def __post_init__(self) -> None:
        if min(self.images, self.crops, self.classes) < 1:
            raise UsageError("a plan needs at least 1 image, 1 crop and 1 class.")
        for rate in (self.teacher_throughput, self.train_throughput):
            if rate is not None and rate <= 0:
                raise UsageError("throughputs must be above 0 crops per second.")
        for form in self.forms:
            if form.k > self.classes:
                raise UsageError(f"{form} keeps {form.k} of {self.classes} classes.")


@dataclass(frozen=True)
class PlannedStore:
    """The estimate for one form.

    Attributes:
        fields: bytes per crop of each array.
        stored_bytes: of all arrays, the list of images and the records.
        cache_bytes: local disk space of the training cache, once per node.
        streamed_bytes_per_crop: of wide arrays, read from the store for every crop used.
        teacher_hours: time to label every crop; None without a throughput.
        read_bytes_per_second: read from the store while training; None without a throughput.
    """

    form: str
    fields: dict[str, float]
    bytes_per_crop: float
    stored_bytes: int
    cache_bytes: int
    streamed_bytes_per_crop: float
    teacher_hours: float | None
    read_bytes_per_second: float | None


@dataclass(frozen=True)
class Plan:
    wanted: Wanted
    stores: tuple[PlannedStore, ...]

    def to_json(self) -> dict[str, Any]:
        w = self.wanted
        return {
            "images": w.images,
            "crops_per_image": w.crops,
            "classes": w.classes,
            "features": [str(f).removeprefix("features ") for f in w.features],
            "teacher_throughput": w.teacher_throughput,
            "train_throughput": w.train_throughput,
            "stores": [asdict(store) for store in self.stores],
        }


def plan(request: Wanted) -> Plan:
    """Estimate a store for each form, or a store of features alone if there is no form."""
    forms: Sequence[Form | None] = request.forms or (None,)
    return Plan(request, tuple(_store(request, form) for form in forms))


def _store(request: Wanted, form: Form | None) -> PlannedStore:
    sizes = {} if request.derived_boxes else {"box": BOX_BYTES, "flip": FLIP_BYTES}
    fields = schema.crop_fields()
    if form is not None:
        sizes |= label_bytes(form, request.classes)
        fields += schema.label_fields(form, request.classes)
    for each in request.features:
        fields += features.fields(each.dims, each.code)
        size = 2.0 * each.dims if each.code == "float16" else each.dims + SCALE_BYTES
        sizes[str(each)] = size
    per_crop = sum(sizes.values())
    crops = request.images * request.crops
    streamed = schema.bytes_per_image([field for field in fields if field.wide], 1)
    cached = schema.bytes_per_image([field for field in fields if not field.wide], request.crops)
    records = FIXED_BYTES + IMAGE_BYTES * request.images
    stored = per_crop * crops + records
    hours = request.teacher_throughput and crops / request.teacher_throughput / 3600
    return PlannedStore(
        form=str(form) if form else "features",
        fields=sizes,
        bytes_per_crop=stored / crops,
        stored_bytes=round(stored),
        cache_bytes=cached * request.images,
        streamed_bytes_per_crop=float(streamed),
        teacher_hours=hours,
        read_bytes_per_second=request.train_throughput and streamed * request.train_throughput,
    )


def label_bytes(form: Form, classes: int) -> dict[str, float]:
    """Bytes per crop of each array of a form."""
    if not form.sparse:
        scores = {form.value_field: 2.0 * classes}
        return scores if form.kind == "full" else {**scores, "logit_max": SCALE_BYTES}
    ids, prob, stick = (_at(form.k, column) for column in range(3))
    log_classes = np.log(list(BY_CLASSES))
    ids *= float(np.interp(np.log(classes), log_classes, list(BY_CLASSES.values())))
    if form.kind == "hard":
        return {"ids": ids}
    return {"ids": ids, form.value_field: stick if form.compact else prob}


def _at(k: int, column: int) -> float:
    """Interpolate linearly between the measured K; beyond them, extend the last segment."""
    ks = np.array(list(MEASURED), dtype=np.float64)
    sizes = np.array([row[column] for row in MEASURED.values()])
    if k <= ks[-1]:
        return float(np.interp(k, ks, sizes))
    slope = (sizes[-1] - sizes[-2]) / (ks[-1] - ks[-2])
    return float(sizes[-1] + slope * (k - ks[-1]))


def paper_form(target: labels.Target) -> Form:
    """The smallest form that serves a target of the paper's Table 2."""
    if target.kind in ("full", "hard"):
        return labels.parse_form(target.kind)
    return Form("topk", max(target.k, 1))
