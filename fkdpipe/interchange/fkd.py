"""FKD: one torch file per image, `<any folders>/<class>/<name>.tar`.

A file holds [coordinates (M, 4), flips (M,), labels], the coordinates as fractions (top / height,
left / width, height / height, width / width) of the decoded image, EXIF orientation not applied,
in float32 or float16. Labels are (M, 2, K), class ids and probabilities, for marginal labels; (M,
2) for smoothing; (M,) ids for hard labels. NumPy arrays in newer files of its generator, tensors
in others; both are read. Not stored: the teacher, its temperature, the number of classes.

Reference: Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", and
the file layout of its released code.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from fkdpipe.common.errors import LabelsError
from fkdpipe.common.progress import Reporter, silent
from fkdpipe.interchange import exporting, matching, torchfile
from fkdpipe.interchange.exporting import Export, Exported, ExportSettings, Labelled
from fkdpipe.interchange.source import (
    ImageLabels,
    ImportSettings,
    LabelSource,
    imported_distribution,
    refuse_half_ids,
    to_pixels,
    whole_numbers,
)
from fkdpipe.interchange.torchfile import BrokenFileError
from fkdpipe.pixels import crops, images
from fkdpipe.pixels.images import ImageFolder
from fkdpipe.storage.labels import Form
from fkdpipe.storage.store import Store

log = logging.getLogger(__name__)

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # coordinates, flips, labels


def open_labels(path: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """Match FKD's label files below a folder to images.

    Raises:
        LabelsError: no files match, none can be read, or ids were rounded by float16.
    """
    tree = matching.match(path, folder, ".tar")
    fraction, _, label = tree.first(parse)
    classes = settings.classes or len(folder.class_names)
    refuse_half_ids(label.dtype, classes, str(path))
    crops = settings.crops or len(fraction)
    notes = []
    largest = int(folder.size_N2.max())
    if fraction.dtype == np.float16 and largest > 1024:
        notes.append(
            "boxes are float16 fractions: in images with a side above 1,024 pixels they are off "
            f"by up to {-(-largest // 2048)} pixels"
        )

    def read(position: int) -> ImageLabels:
        arrays = parse(tree.read(position))
        if settings.crops is None and len(arrays[0]) != crops:
            detail = f"{len(arrays[0])} crops, others have {crops}; --crops M takes the first M"
            raise BrokenFileError("other-crops", detail)
        return _labels(arrays, folder.size_N2[position].tolist())

    return LabelSource(
        format="fkd",
        form=_form(label),
        classes=classes,
        classes_known=settings.classes is not None,
        crops=crops,
        distribution=imported_distribution("fkd", crops),
        fingerprint=tree.fingerprint(),
        read=read,
        notes=tuple(notes),
        extra=tree.extra,
        extra_examples=tree.extra_examples,
    )


def parse(data: bytes) -> Arrays:
    """The three arrays of a file.

    Raises:
        BrokenFileError: it holds something else.
    """
    content = torchfile.loads(data)
    if not isinstance(content, (list, tuple)) or len(content) != 3:
        raise BrokenFileError("broken-label", "not a list of coordinates, flips and labels")
    fraction, flip, label = (torchfile.as_array(value) for value in content)
    if (fraction.ndim, flip.ndim) != (2, 1) or not label.ndim or not len(fraction):
        shapes = f"{fraction.shape}, {flip.shape} and {label.shape}"
        raise BrokenFileError("broken-label", f"coordinates, flips and labels of shapes {shapes}")
    if not len(fraction) == len(flip) == len(label):
        raise BrokenFileError("broken-label", "coordinates, flips and labels of different lengths")
    _form(label)
    return fraction, flip, label


def _form(label: np.ndarray) -> Form:
    """(M,) hard, (M, 2) smoothing, which is the first class of a topk, (M, 2, K) topk:K."""
    if label.ndim == 1:
        return Form("hard", 1)
    if label.ndim in (2, 3) and label.shape[1] == 2 and (label.ndim == 2 or label.shape[2]):
        return Form("topk", 1 if label.ndim == 2 else label.shape[2])
    raise BrokenFileError("broken-label", f"labels of shape {label.shape}")


def _labels(arrays: Arrays, size: list[int]) -> ImageLabels:
    fraction, flip, label = arrays
    box, moved = to_pixels(fraction, size)
    if flip.dtype != bool:
        flip = whole_numbers(flip, "flips").astype(bool)
    form = _form(label)
    if form.kind == "hard":
        ids = whole_numbers(label, "class ids")[:, None]
        return ImageLabels(box, flip, ids, moved=moved)
    pair = label.reshape(len(label), 2, form.k)
    ids, prob = whole_numbers(pair[:, 0], "class ids"), pair[:, 1].astype(np.float32)
    return ImageLabels(box, flip, ids, prob, moved=moved)


def write_labels(
    store: Store, out: Path, settings: ExportSettings, *, reporter: Reporter = silent
) -> Exported:
    """Write a store's labels where FKD's trainer looks for them: `out/train/<class>/<name>.tar`.

    Files hold float32 tensors, which every version of torch reads; `out` is the trainer's
    softlabel_path. The trainer names a label by the last three parts of its image's path, up to the
    first dot; the names written here end at the first dot too, if that is unambiguous.

    Raises:
        LabelsError: `out` is not empty, the store has colour jitter, or it has more classes than
            float32 can count exactly.
    """
    import torch

    export = Export(store, settings)
    exporting.refuse_jitter(export, "FKD")
    if export.classes > 2**24:
        raise LabelsError("FKD stores class ids as float32, which is exact up to 2**24 classes.")
    trainer = _trainer_note(export)
    if trainer:
        log.warning("%s", trainer)  # before anything is written, and again in the notes
    root = exporting.empty_folder(out)
    names, odd = _names(store)
    files = 0
    with reporter.task("export", store.num_images, "images") as advance:
        for unit in export.units(advance):
            H, W = (unit.size_I2[:, None, k].astype(np.float64) for k in (0, 1))
            sides = np.stack([H, W, H, W], axis=-1)
            fraction = torch.from_numpy((unit.box_IM4 / sides).astype(np.float32))
            flip = torch.from_numpy(unit.flip_IM)
            label = torch.from_numpy(_stored(export, unit))
            for i, row in enumerate(unit.rows.tolist()):
                path = images.path_of(root, names[row])
                os.makedirs(os.path.dirname(path), exist_ok=True)
                # torch.save would save a view with the storage of the whole unit
                value = [v[i].clone() for v in (fraction, flip, label)]
                exporting.save_torch(value, os.fsdecode(path))
                files += 1
    notes = [
        *export.notes(),
        "FKD's files do not hold the teacher, its temperature, the number of classes or the list "
        "of images; keep the store or write them down",
    ]
    if trainer:
        notes.append(trainer)
    texts = {
        "cut": "labels are named up to the image name's first dot, where FKD's trainer looks",
        "ambiguous": "images share a name with another up to the first dot; their labels are "
        "named in full, and FKD's trainer will not find them",
        "deep": "images lie in other folders than class/, or in one with a dot in its name: FKD's "
        "trainer will not find their labels below this folder",
    }
    notes += [f"{odd[kind]:,} {text}" for kind, text in texts.items() if odd[kind]]
    return Exported(len(export.finished.rows), files, tuple(notes))


def _trainer_note(export: Export) -> str:
    """Why FKD's trainer cannot use these labels; "" if it can."""
    if export.form.kind == "hard" or export.keep in (1, 5, 10):
        return ""
    return f"FKD's trainer supports K = 5 and 10; these labels keep {export.keep}"


def _stored(export: Export, unit: Labelled) -> np.ndarray:
    """float32 (I, M, 2, K), (I, M, 2) for one class, or int64 (I, M) for hard labels."""
    if export.form.kind == "hard":
        return unit.ids_IMK[..., 0]
    pair = np.stack([unit.ids_IMK.astype(np.float32), unit.prob_IMK], axis=2)
    return pair[..., 0] if export.keep == 1 else pair


def _names(store: Store) -> tuple[list[str], dict[str, int]]:
    """The name of each row's label file, and the number of unusual names by kind."""
    keys = [f"train/{key}" for key in store.images.keys]
    short = [matching.cut_name(key) for key in keys]
    _, index, counts = np.unique(crops.image_ids(short), return_inverse=True, return_counts=True)
    names = []
    odd = {"cut": 0, "ambiguous": 0, "deep": 0}
    for key, name, shared in zip(keys, short, (counts[index] > 1).tolist(), strict=True):
        odd["deep"] += key.count("/") != 2 or "." in os.path.dirname(key)
        odd["ambiguous"] += shared
        odd["cut"] += not shared and name != matching.stem(key)
        # Shared names keep the extension, since a.jpg and a.png differ in nothing else.
        names.append(f"{key if shared else name}.tar")
    return names, odd
