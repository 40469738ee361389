"""Frozen teachers: their own input size, interpolation and normalisation, their own precision.

A teacher is always in eval mode and without gradients to its weights. Several are averaged as
probabilities at one temperature, each seeing the same crops at its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from timm.data import ImageNetInfo

from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks import models, weight_files
from fkdpipe.networks.feature_layers import FeatureNetwork, Needs, Outputs
from fkdpipe.networks.models import ModelSpec, Preprocessing

Precision = Literal["float32", "bfloat16", "float16"]
ClassMap = dict[str, int] | tuple[str, ...]


@dataclass(frozen=True)
class Teacher:
    """One frozen network.

    Attributes:
        classes: width of its output, before `columns`.
        columns: int64, which outputs are the folder's classes, None for all in order.
        weight: share in an ensemble; the shares of all teachers sum to 1.
        digest: sha256 of its weights.
    """

    spec: ModelSpec
    module: FeatureNetwork
    preprocessing: Preprocessing
    classes: int
    columns: np.ndarray | None
    weight: float
    precision: Precision
    digest: str

    def logits(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """float32 (B, C) scores before softmax, of normalised channels-last pixels."""
        return self.outputs(pixels_B3HW).logits

    def outputs(self, pixels_B3HW: torch.Tensor) -> Outputs:
        """Features and logits (float32, of the folder's classes), without gradients."""
        with torch.no_grad(), autocast(self.precision, pixels_B3HW.device):
            made = self.module(pixels_B3HW)
        logits_BC = made.logits.float()
        if self.columns is not None:
            logits_BC = logits_BC[:, torch.from_numpy(self.columns).to(logits_BC.device)]
        return replace(made, logits=logits_BC)

    def facts(self) -> dict[str, Any]:
        """What a store records: everything that decides its outputs."""
        p = self.preprocessing
        return {
            "name": self.spec.name,
            "library": self.spec.library,
            "weights": self.digest,
            "share": self.weight,
            "size": list(p.size),
            "interpolation": p.interpolation,
            "mean": list(p.mean),
            "std": list(p.std),
            "classes": self.classes,
            "columns": None if self.columns is None else self.columns.tolist(),
        }


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """torch's autocast at a precision; float32 switches it off."""
    if precision == "float32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def load_teachers(
    specs: Sequence[ModelSpec],
    *,
    class_names: Sequence[str],
    weights: Sequence[float] = (),
    class_maps: Sequence[ClassMap] = (),
    precision: Precision = "float32",
    device: torch.device | None = None,
    needs: Needs = Needs(),
    size: tuple[int, int] | None = None,
) -> list[Teacher]:
    """Build, fill and freeze teachers.

    Args:
        class_names: of the image folder; each teacher must have outputs for them.
        weights: relative shares, one per teacher; equal when empty.
        class_maps: none, one for all, or one per teacher (`read_class_map`).
        needs: what is asked of each beside logits.
        size: of the input (height, width) in pixels; None takes each network's own.

    Raises:
        UsageError: numbers of weights or maps that do not fit.
        ModelError: unknown name, unreadable weights, classes that cannot be matched, or no
            trained classifier.
    """
    if not specs:
        raise UsageError("name at least one teacher.")
    if precision not in get_args(Precision):
        raise UsageError(f"precision must be one of {', '.join(get_args(Precision))}.")
    if weights and len(weights) != len(specs):
        raise UsageError(f"{len(weights)} teacher weights for {len(specs)} teachers.")
    if not all(0 < weight < float("inf") for weight in weights):
        raise UsageError("teacher weights must be positive numbers.")
    if len(class_maps) not in (0, 1, len(specs)):
        raise UsageError(f"{len(class_maps)} class maps for {len(specs)} teachers.")
    maps: list[ClassMap | None] = list(class_maps) or [None]
    maps = maps * len(specs) if len(maps) == 1 else maps
    shares = [float(w) for w in weights] or [1.0] * len(specs)
    teachers = []
    for spec, share, class_map in zip(specs, shares, maps, strict=True):
        loaded = models.build(spec, size=size)
        if class_names and not loaded.classifier:
            raise ModelError(
                f"{spec}: its classifier was never trained, because its run learnt features alone. "
                "It can lend features, or be judged by `fkdpipe transfer`.",
                code="no-classifier",
            )
        columns = None
        if spec.library not in models.SELF_SUPERVISED:  # whose outputs are no classes
            columns = match_classes(
                class_names, loaded.classes, loaded.class_names, class_map, teacher=str(spec)
            )
        digest = weight_files.state_digest(loaded.module)
        module = FeatureNetwork(loaded.module, needs).eval().requires_grad_(False)
        module = module.to(device).to(memory_format=torch.channels_last)
        teachers.append(
            Teacher(
                spec=spec,
                module=module,
                preprocessing=loaded.preprocessing,
                classes=loaded.classes,
                columns=columns,
                weight=share / sum(shares),
                precision=precision,
                digest=digest,
            )
        )
    return teachers


def numbered_classes(class_names: Sequence[str]) -> dict[str, int]:
    """A class map for folders that are named by class index, "0" to "999" (ImageNet-V2).

    Raises:
        UsageError: other names among them.
    """
    others = [name for name in class_names if not name.isdigit()]
    if others:
        raise UsageError(f"folders named by class index are asked for; found {others[0]!r}.")
    return {name: int(name) for name in class_names}


def read_class_map(path: Path) -> dict[str, int] | tuple[str, ...]:
    """A file that says where a teacher's outputs are.

    One column: the teacher's class names, one per line, in the order of its outputs.
    Two columns (tab or spaces): a folder's class name and the index of its output.

    Returns:
        A tuple of names, or a dict from folder class to output index.

    Raises:
        UsageError: unreadable, or neither form.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the class map cannot be read: {error}.") from error
    rows = [line.rsplit(None, 1) for line in lines if line and not line.startswith("#")]
    if rows and all(len(row) == 2 and row[1].isdigit() for row in rows):
        return {name: int(index) for name, index in rows}
    if rows and all(not (len(row) == 2 and row[1].isdigit()) for row in rows):
        return tuple(" ".join(row) for row in rows)
    raise UsageError(
        f"{path}: a class map has either one class name per line, in the order of the teacher's "
        "outputs, or 'class index' on every line."
    )


def match_classes(
    class_names: Sequence[str],
    outputs: int,
    output_names: Sequence[str],
    class_map: ClassMap | None,
    *,
    teacher: str,
) -> np.ndarray | None:
    """Which outputs of a teacher are the folder's classes.

    By the class map; else by the names its checkpoint records; else, for 1,000 outputs and folders
    named by ImageNet's synset ids, by those; else by position when the numbers agree.

    Args:
        class_names: of the folder; empty (unlabelled images) keeps all outputs.

    Returns:
        int64 (C,), or None when it is all outputs in order.

    Raises:
        ModelError: no way to match them; says what to give.
    """
    if not class_names:
        return None
    if class_map is None and output_names:
        class_map = tuple(output_names)
    if class_map is None and outputs == 1000:
        synsets = tuple(ImageNetInfo().label_names())
        if set(class_names) <= set(synsets):
            class_map = synsets
    if class_map is None:
        if outputs != len(class_names):
            raise ModelError(
                f"{teacher} has {outputs} outputs, the image folder {len(class_names)} classes. "
                "Say which output is which class with --class-map FILE: the teacher's class names "
                "in the order of its outputs, or 'class index' on each line.",
                code="classes-differ",
            )
        return None
    if isinstance(class_map, tuple):
        class_map = {name: index for index, name in enumerate(class_map)}
    missing = [name for name in class_names if name not in class_map]
    if missing:
        raise ModelError(
            f"{teacher}: {len(missing)} classes of the image folder are not among its outputs "
            f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}).",
            code="classes-differ",
        )
    columns = np.array([class_map[name] for name in class_names], dtype=np.int64)
    if len(columns) and columns.max() >= outputs:
        raise ModelError(
            f"{teacher}: the class map names output {columns.max()}; it has {outputs}.",
            code="classes-differ",
        )
    same = len(columns) == outputs and bool((columns == np.arange(outputs)).all())
    return None if same else columns


def average(
    logits: Sequence[torch.Tensor], shares: Sequence[float], temperature: float
) -> torch.Tensor:
    """float32 (B, C) log-probabilities of an ensemble: log sum_i share_i softmax(z_i / T)."""
    parts = [
        torch.log_softmax(z / temperature, dim=1) + np.log(share)
        for z, share in zip(logits, shares, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.logsumexp(torch.stack(parts), dim=0)
