"""What every format provides: opened label files of another system, read image by image.

Letters: N images of the folder, M crops of each, K kept classes, C classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import PositiveFloat, PositiveInt, field_validator

from fkdpipe.common import config
from fkdpipe.common.config import Seed
from fkdpipe.common.errors import LabelsError
from fkdpipe.interchange.torchfile import BrokenFileError
from fkdpipe.pixels.crops import boxes_outside
from fkdpipe.storage import schema
from fkdpipe.storage.labels import Form
from fkdpipe.storage.schema import Field
from fkdpipe.storage.settings import CropsSettings

SUM_TOLERANCE = 2.0**-9  # float16 probabilities of a confident teacher sum to a little above 1
# What parsers raise on label files that are not what they should be.
DAMAGE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
SEED_FIELD = Field("seed", "int32", (), "bitshuffle", 0)


@config.settings
class ImportSettings:
    """What the files do not record, and how to import them."""

    classes: PositiveInt | None = None
    """C, the teacher's number of classes; by default, the folder's."""
    temperature: PositiveFloat | None = None
    """Temperature of the teacher's softmax; by default, recorded as unknown."""
    teacher: str = ""
    """Name of the teacher; by default, recorded as unknown."""
    crops: PositiveInt | None = None
    """M, the first crops of every image; by default, all. Required for label maps."""
    source: str = ""
    """Name of the labels within the store; by default, the teacher's, or the format's."""
    seed: Seed = 0
    """Seed of the order of images in the store, and of crops drawn for label maps."""
    keep: PositiveInt = 5
    """K, classes kept of a pooled label map."""
    compat_transposed: bool = False
    """Pool label maps with rows and columns exchanged, as in the published code."""
    skip_transformed: bool = False
    """Leave out crops with further transformations than crop and flip."""
    assume_plain: bool = False
    """Assume that the labels were made with crop and flip alone."""
    sampler_seed: Seed = 42
    """Seed of the sampler that ordered the batch files."""
    threads: PositiveInt = 4
    """Threads that read label files."""

    @field_validator("source")
    @classmethod
    def _fit_name(cls, source: str) -> str:
        if source:
            schema.check_source_name(source)
        return source


@dataclass(frozen=True)
class ImageLabels:
    """Labels of one image's crops.

    Attributes:
        box_M4: int64, (top, left, height, width) in pixels. flip_M: bool.
        ids_MK: int64 classes in any order; of equally probable ones, the teacher's first choice
            comes first. None for logits.
        prob_MK: float32; None for form `hard` and logits.
        logit_MC: float16 or float32 scores before softmax; None for the other forms.
        seed_M: int32, if the crops came from seeds that an export needs.
        moved: number of boxes that rounding had put outside the image and that were moved back.
    """

    box_M4: np.ndarray
    flip_M: np.ndarray
    ids_MK: np.ndarray | None = None
    prob_MK: np.ndarray | None = None
    logit_MC: np.ndarray | None = None
    seed_M: np.ndarray | None = None
    moved: int = 0


@dataclass(frozen=True)
class LabelSource:
    """Label files of another system, opened.

    Attributes:
        format: name of the format. form, classes, crops: of the labels; C and M.
        classes_known: whether the user or the files set C; otherwise it is the folder's.
        distribution: settings of the crops part.
        fingerprint: hex digest of the files that were read when opening.
        read: position in the image folder to its labels; raises BrokenFileError. Called from
            several threads.
        fields: further arrays of the crops part.
        notes: what a user should know before using the labels.
        temperature: if the format fixes it. origin: what else was decided when opening.
        extra: number of labels that belong to no image. extra_examples: names of up to 20.
    """

    format: str
    form: Form
    classes: int
    classes_known: bool
    crops: int
    distribution: CropsSettings
    fingerprint: str
    read: Callable[[int], ImageLabels]
    fields: tuple[Field, ...] = ()
    notes: tuple[str, ...] = ()
    temperature: float | None = None
    origin: Mapping[str, object] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)
    extra: int = 0
    extra_examples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise LabelsError(f"these {self.format} labels have no crops.", code="no-labels")

    def all_notes(self) -> tuple[str, ...]:
        if not self.extra:
            return self.notes
        more = ", ..." if self.extra > len(self.extra_examples) else ""
        examples = ", ".join(self.extra_examples)
        return (*self.notes, f"{self.extra:,} labels belong to no image: {examples}{more}")


def imported_distribution(
    format_: str,
    crops: int,
    *,
    scale: tuple[float, float] | None = None,
    ratio: tuple[float, float] | None = None,
    flip: float | None = None,
) -> CropsSettings:
    """Settings of a crops part with imported boxes; None means unknown."""
    return CropsSettings(
        name=f"imported:{format_}",
        version=1,
        scale=scale,
        ratio=ratio,
        flip=flip,
        seed=None,
        first=0,
        crops=crops,
    )


def to_pixels(fraction_M4: np.ndarray, size: Sequence[int]) -> tuple[np.ndarray, int]:
    """Boxes in pixels from (top/H, left/W, height/H, width/W), and how many were moved.

    float32 fractions give the exact pixels. float16 fractions are off by up to size / 2048, so a
    box at the border may reach outside the image; it is moved back by at most that much.

    Args:
        size: (height, width) of the decoded image.

    Raises:
        BrokenFileError: the values are not fractions.
    """
    if fraction_M4.ndim != 2 or fraction_M4.shape[1] != 4 or fraction_M4.dtype.kind != "f":
        raise BrokenFileError("broken-label", f"boxes of shape {fraction_M4.shape}")
    if not np.isfinite(fraction_M4).all() or np.abs(fraction_M4).max(initial=0) > 2:
        raise BrokenFileError("broken-label", "boxes that are not fractions of the image")
    H, W = int(size[0]), int(size[1])
    box = np.rint(fraction_M4.astype(np.float64) * [H, W, H, W]).astype(np.int64)
    if fraction_M4.dtype != np.float16:
        return box, 0
    over = box[:, :2] + box[:, 2:] - [H, W]
    slack = np.ceil(np.array([H, W]) * 2.0**-11).astype(np.int64)
    shift = np.where((over > 0) & (over <= slack) & (over <= box[:, :2]), over, 0)
    box[:, :2] -= shift
    return box, int(shift.any(axis=1).sum())


def check(labels: ImageLabels, source: LabelSource, size: Sequence[int]) -> ImageLabels:
    """The first M crops of an image's labels, checked.

    Raises:
        BrokenFileError: too few crops, a box outside the image, invalid classes or probabilities.
    """
    M = source.crops
    if len(labels.box_M4) < M or len(labels.flip_M) < M:
        detail = f"{len(labels.box_M4)} crops, fewer than the {M} to import"
        raise BrokenFileError("too-few-crops", detail)
    box_M4 = labels.box_M4[:M]
    if (box_M4 < 0).any() or boxes_outside(box_M4[None], np.array([size])).any():
        detail = f"a box reaches outside the image of {size[1]}x{size[0]} pixels"
        raise BrokenFileError("box-outside", detail)
    if labels.logit_MC is not None:
        logit = labels.logit_MC[:M]
        if logit.shape != (M, source.classes) or not np.isfinite(logit).all():
            raise BrokenFileError("broken-label", f"scores of shape {logit.shape}, or not finite")
        return ImageLabels(box_M4, labels.flip_M[:M], logit_MC=logit, moved=labels.moved)
    assert labels.ids_MK is not None
    ids = labels.ids_MK[:M]
    if ids.shape != (M, source.form.k):
        raise BrokenFileError("broken-label", f"{ids.shape} classes, not {(M, source.form.k)}")
    if ids.min() < 0 or ids.max() >= source.classes:
        worst = int(ids.max()) if ids.max() >= source.classes else int(ids.min())
        raise BrokenFileError("class-range", f"class {worst} of {source.classes}")
    if source.form.k > 1 and (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        raise BrokenFileError("broken-label", "a label has the same class twice")
    prob = None if labels.prob_MK is None else labels.prob_MK[:M]
    if prob is not None:
        if prob.shape != ids.shape or not np.isfinite(prob).all() or prob.min() < 0:
            raise BrokenFileError("broken-label", "invalid probabilities")
        if prob.sum(axis=1).max() > 1 + SUM_TOLERANCE:
            raise BrokenFileError("broken-label", "probabilities that sum to more than 1")
    seeds = None if labels.seed_M is None else labels.seed_M[:M]
    return ImageLabels(box_M4, labels.flip_M[:M], ids, prob, None, seeds, labels.moved)


def whole_numbers(values: np.ndarray, what: str) -> np.ndarray:
    """Whole numbers of any stored type, as int64.

    Raises:
        BrokenFileError: they are not whole numbers.
    """
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise BrokenFileError("broken-label", f"{what} of type {values.dtype}")
    whole = values.astype(np.int64)
    if (whole != values).any():
        raise BrokenFileError("broken-label", f"{what} that are not whole numbers")
    return whole


def refuse_half_ids(dtype: np.dtype, classes: int, where: str) -> None:
    """Refuse float16 class ids above 2,048, where float16 holds only every second integer.

    Raises:
        LabelsError: the ids were rounded when the file was written and cannot be restored.
    """
    if dtype == np.float16 and classes > 2048:
        raise LabelsError(
            f"{where} stores class ids as float16, which is exact only up to 2,048, and there are "
            f"{classes:,} classes: ids were rounded when these files were written. Generate them "
            "again in float32.",
            code="half-ids",
        )


def refuse_short_ids(classes: int, where: str) -> None:
    """Refuse int16 class ids above 32,767.

    Raises:
        LabelsError: ids wrapped around when the file was written.
    """
    if classes > 32_768:
        raise LabelsError(
            f"{where} stores class ids as int16, which ends at 32,767, and there are {classes:,} "
            "classes: larger ids wrapped around when these files were written.",
            code="short-ids",
        )


def scratch_table(epochs: int, images: int) -> np.ndarray:
    """int32 (E, N) of -1, in a temporary file: for hundreds of epochs of millions of images it may
    not fit in memory."""
    with tempfile.TemporaryFile() as file:
        table = np.memmap(file, dtype=np.int32, mode="w+", shape=(epochs, images))
    table[:] = -1
    return table
