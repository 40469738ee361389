"""Apple's ml-dr ("Reinforce Data, Multiply Impact"): one torch file per image, `<index>.pth.tar`.

The index is the image's position in torchvision's ImageFolder. A file holds (index, samples), each
sample {"params": ..., "prob": (probabilities, classes)} with K classes in any order; params list
the parameters of each random transformation, in a fixed order. `config.pth.tar` names the
transformations. Boxes are in pixels of the decoded image. Samples that were also changed by
RandAugment, erasing, mixup or cutmix have labels of pixels that crop and flip alone do not give:
they are refused, or left out on request.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fkdpipe.common.errors import LabelsError, UsageError
from fkdpipe.common.progress import Reporter, silent
from fkdpipe.interchange import exporting, imagefolder, matching, torchfile
from fkdpipe.interchange.exporting import Export, Exported, ExportSettings, Labelled
from fkdpipe.interchange.source import (
    DAMAGE,
    ImageLabels,
    ImportSettings,
    LabelSource,
    imported_distribution,
)
from fkdpipe.interchange.torchfile import BrokenFileError
from fkdpipe.pixels.images import ImageFolder
from fkdpipe.storage.labels import Form
from fkdpipe.storage.schema import Json
from fkdpipe.storage.settings import CropsSettings
from fkdpipe.storage.store import Store

# With recorded parameters, in the order they are applied; the last two mix two images.
_RECORDED = ("resize", "random_crop", "random_resized_crop", "random_horizontal_flip",
             "rand_augment", "random_erase", "mixup", "cutmix")  # fmt: skip
_MIXING = ("mixup", "cutmix")
_RESIZING = ("resize", "center_crop", "random_crop")

Sample = tuple[Any, Any, list[str]]  # box, flip, what else was done to the pixels


def open_labels(path: Path, folder: ImageFolder, settings: ImportSettings) -> LabelSource:
    """Open ml-dr's files, in `path` or in `path/reinforced_data`.

    Raises:
        LabelsError: no configuration, another number of images, or transformed pixels.
        UsageError: `skip_transformed` without `crops`.
    """
    inside = path / "reinforced_data"
    root = inside if (inside / "config.pth.tar").is_file() else path
    config = _config(root)
    used = _transformations(config, root)
    index_N = imagefolder.index_of(folder.keys, (r.key for r in folder.rejected))
    _check_count(root, int(index_N.max()) + 1)
    probe, fingerprint = _probe(root, index_N, used, settings)
    crops = settings.crops or len(probe)
    k = len(probe[0][1])
    classes = settings.classes or config.get("num_classes")
    crop = config["reinforce"]["image_augmentation"]["random_resized_crop"]

    def read(position: int) -> ImageLabels:
        index = int(index_N[position])
        samples = _samples(_read(root, index), index, used)
        if not settings.skip_transformed and any(done for (_, _, done), _ in samples):
            raise BrokenFileError("transformed", "changed by more than crop and flip")
        plain = [sample for sample in samples if not sample[0][2]]
        return _labels(plain[:crops], k)

    return LabelSource(
        format="ml-dr",
        form=Form("topk", k),
        classes=classes if type(classes) is int else len(folder.class_names),
        classes_known=type(classes) is int,
        crops=crops,
        distribution=imported_distribution(
            "ml-dr",
            crops,
            scale=tuple(crop.get("scale", (0.08, 1.0))),
            ratio=tuple(crop.get("ratio", (3 / 4, 4 / 3))),
        ),
        fingerprint=fingerprint,
        read=read,
        temperature=1.0,  # the only one of its generator
        provenance={"ml-dr": {"teacher": config.get("teacher"), "reinforce": config["reinforce"]}},
    )


def _read(root: Path, index: int) -> bytes:
    if index < 0:
        raise BrokenFileError("no-label", "torchvision's ImageFolder does not list this file")
    try:
        return (root / f"{index}.pth.tar").read_bytes()
    except OSError as error:
        raise BrokenFileError("no-label", f"{index}.pth.tar: {error.strerror}") from error


def _config(root: Path) -> Json:
    """The configuration of a reinforced data set.

    Raises:
        LabelsError: it is missing or invalid.
    """
    file = root / "config.pth.tar"
    try:
        config = torchfile.loads(file.read_bytes())
        config["reinforce"]["image_augmentation"].items()
    except FileNotFoundError:
        raise LabelsError(
            f"{root} has no config.pth.tar, which names the transformations of the images. Files "
            "written by joblib (.jb) cannot be read safely.",
            code="no-labels",
        ) from None
    except (BrokenFileError, KeyError, TypeError, AttributeError) as error:
        raise LabelsError(f"{file} cannot be read: {error}.", code="broken-labels") from error
    return config


def _transformations(config: Json, root: Path) -> list[str]:
    """The transformations of `_RECORDED` that were used, in this order.

    Raises:
        LabelsError: the boxes are not those of random crops of the decoded image.
    """
    named = config["reinforce"]["image_augmentation"]
    used = {name for name, value in named.items() if (value or {}).get("enable", True)}
    resizing = sorted(used & set(_RESIZING))
    if resizing or "random_resized_crop" not in used:
        raise LabelsError(
            f"{root}: its images were prepared with {', '.join(resizing) or 'no random crop'}, so "
            "its boxes are not in pixels of the original images.",
            code="transformed",
        )
    return [name for name in _RECORDED if name in used]


def _check_count(root: Path, images: int) -> None:
    """Check the number of files: they are named by position, so a missing image shifts all labels.

    Raises:
        LabelsError: the largest index is not that of the folder's last image.
    """
    largest = -1
    with os.scandir(root) as entries:
        for entry in entries:
            number = re.fullmatch(r"(\d{1,9})\.pth\.tar", entry.name)
            largest = max(largest, int(number[1]) if number else -1)
    if largest + 1 != images:
        raise LabelsError(
            f"{root} holds labels for {largest + 1:,} images, and torchvision's ImageFolder lists "
            f"{images:,}. ml-dr names labels by position, so another number of images would give "
            "labels to the wrong images. Use the folder they were made for.",
            code="wrong-folder",
        )


def _samples(data: bytes, index: int, used: list[str]) -> list[tuple[Sample, tuple]]:
    """Each sample of a file: its transformations, and its (probabilities, classes)."""
    content = torchfile.loads(data)
    if not isinstance(content, tuple) or [type(part) for part in content] != [int, list]:
        raise BrokenFileError("broken-label", "not a pair of index and samples")
    if content[0] != index:
        raise BrokenFileError("wrong-index", f"it belongs to image {content[0]}, not {index}")
    try:
        samples = [(_applied(s["params"], used), tuple(s["prob"])) for s in content[1]]
        sizes = {tuple(len(part) for part in label) for _, label in samples}
    except DAMAGE as error:
        raise BrokenFileError("broken-label", f"an invalid sample ({error})") from error
    if not sizes or any(len(size) != 2 or size[0] != size[1] or not size[0] for size in sizes):
        raise BrokenFileError("broken-label", "samples without a pair of probabilities and classes")
    return samples


def _applied(params: Any, used: list[str]) -> Sample:
    """The transformations of a sample. Compressed parameters are a list, others a dict."""
    if isinstance(params, dict):
        first = {n: params[n] if n in _MIXING else params[n][0] for n in used}
    else:
        mixes = any(name in _MIXING for name in used)
        values, partner = (params[1:], params[0]) if mixes else (params, None)
        both = partner is not None
        first = {
            name: value[0] if both and name not in _MIXING else value
            for name, value in zip(used, values, strict=True)
        }
    erased = first.get("random_erase")
    if erased is not None and erased[0] == -1:  # no area was found, so nothing was erased
        first["random_erase"] = None
    done = [n for n in ("rand_augment", "random_erase", *_MIXING) if first.get(n) is not None]
    return first["random_resized_crop"], first.get("random_horizontal_flip", False), done


def _labels(samples: list[tuple[Sample, tuple]], k: int) -> ImageLabels:
    box, flip, ids, prob = [], [], [], []
    for (area, mirrored, _), label in samples:
        if len(label) != 2 or any(len(part) != k for part in label):
            raise BrokenFileError("broken-label", f"a label without exactly {k} classes")
        box.append(_numbers(area, int, 4))
        flip.append(bool(mirrored))
        prob.append(_numbers(label[0], (int, float), k))
        ids.append(_numbers(label[1], int, k))
    M = len(samples)
    return ImageLabels(
        np.array(box, dtype=np.int64).reshape(M, 4),
        np.array(flip, dtype=bool),
        np.array(ids, dtype=np.int64).reshape(M, k),
        np.array(prob, dtype=np.float32).reshape(M, k),
    )


def _numbers(values: Any, kind: Any, count: int) -> list:
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise BrokenFileError("broken-label", f"not {count} numbers")
    if not all(isinstance(v, kind) and abs(v) < 2**31 for v in values):
        raise BrokenFileError("broken-label", "a non-numeric value")
    return list(values)


def _probe(
    root: Path, index_N: np.ndarray, used: list[str], settings: ImportSettings
) -> tuple[list[tuple], str]:
    """Labels of the first readable file, and a digest of a few files.

    Raises:
        LabelsError: none can be read, or samples have further transformations than crop and flip.
        UsageError: such samples are to be left out, and the number of crops is not set.
    """
    digest, done, fewest, total = hashlib.sha256(), Counter[str](), None, 0
    first: list[tuple] = []
    reasons: list[str] = []
    for index in index_N[matching.spread(len(index_N))].tolist():
        try:
            data = _read(root, index)
            samples = _samples(data, index, used)
        except BrokenFileError as error:
            reasons.append(f"{index}.pth.tar: {error}")
            continue
        digest.update(data)
        first = first or [label for _, label in samples]
        plain = sum(not changes for (_, _, changes), _ in samples)
        fewest = plain if fewest is None else min(fewest, plain)
        total += len(samples)
        done.update(name for (_, _, changes), _ in samples for name in changes)
    if not first or not first[0]:
        raise LabelsError(
            f"{root}: no label file could be read; for example {', '.join(reasons[:1])}.",
            code="broken-labels",
        )
    if done and not settings.skip_transformed:
        what = ", ".join(f"{name} ({count})" for name, count in done.most_common())
        raise LabelsError(
            f"{root}: of {total} samples checked, some were also changed by {what}. Their labels "
            "belong to pixels that crop and flip alone do not give. --skip-transformed imports the "
            f"others: at least {fewest} per image of those checked.",
            code="transformed",
        )
    if done and settings.crops is None:
        raise UsageError(
            f"choose how many samples of each image to import: --crops M. Of those checked, every "
            f"image has at least {fewest} made with crop and flip alone."
        )
    return first, digest.hexdigest()


def write_labels(
    store: Store, out: Path, settings: ExportSettings, *, reporter: Reporter = silent
) -> Exported:
    """Write a store's labels as ml-dr's trainer reads them, with their configuration.

    Raises:
        LabelsError: `out` is not empty, or the store has colour jitter.
    """
    export = Export(store, settings)
    exporting.refuse_jitter(export, "ml-dr")
    root = exporting.empty_folder(out)
    listed = store.images
    index_N = imagefolder.index_of([str(k) for k in listed.keys], (r[0] for r in listed.rejected))
    exporting.save_torch(_export_config(export), root / "config.pth.tar")
    files = 1
    with reporter.task("export", store.num_images, "images") as advance:
        for unit in export.units(advance):
            for i, index in enumerate(index_N[unit.rows].tolist()):
                if index >= 0:
                    # Protocol 2, not ml-dr's 4: since torch 2.6, only 2 loads by default.
                    sample = (index, _export_samples(unit, i))
                    exporting.save_torch(sample, root / f"{index}.pth.tar")
                    files += 1
    notes = [
        *export.notes(),
        "ml-dr names labels by position in torchvision's ImageFolder: train on exactly this folder",
    ]
    missing = store.num_images - (files - 1)
    if missing:
        notes.append(f"{missing:,} images have no file; ml-dr's loader stops at the first of them")
    return Exported(len(export.finished.rows), files, tuple(notes))


def _export_samples(unit: Labelled, i: int) -> list[Json]:
    """Samples in plain Python numbers, the only ones that ml-dr's reader accepts."""
    columns = (unit.box_IM4, unit.flip_IM, unit.prob_IMK, unit.ids_IMK)
    rows = zip(*(column[i].tolist() for column in columns), strict=True)
    return [{"params": [tuple(box), flip], "prob": (p, ids)} for box, flip, p, ids in rows]


def _export_config(export: Export) -> Json:
    """The configuration that ml-dr's trainer reads, with what else is known."""
    distribution: CropsSettings = export.finished.crops[0].part.settings
    known = {"scale": distribution.scale, "ratio": distribution.ratio}
    crop = {name: list(pair) for name, pair in known.items() if pair is not None}
    flip = 0.5 if distribution.flip is None else distribution.flip
    return {
        "num_classes": export.classes,
        "teacher": {"name": ",".join(str(t.get("name")) for t in export.settings.teachers)},
        "reinforce": {
            "num_samples": export.crops,
            "topk": export.keep,
            "compress": True,
            "joblib": False,
            "gzip": False,
            "image_augmentation": {
                "uint8": {"enable": True},
                "random_resized_crop": {"enable": True, "size": 224, **crop},
                "random_horizontal_flip": {"enable": True, "p": flip},
                "to_tensor": {"enable": True},
                "normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            },
        },
    }
