"""Frozen teachers with their own input size, interpolation, normalisation and precision.

A teacher is always in eval mode and its weights have no gradients. An ensemble averages the
probabilities at one temperature; each teacher sees the same crops at its own size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import nn

from fkdpipe.common import disk
from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks import models, weight_files
from fkdpipe.networks.feature_layers import FeatureNetwork, Needs, Outputs
from fkdpipe.networks.models import Loaded, ModelSpec, Preprocessing

Precision = Literal["float32", "bfloat16", "float16"]
ClassMap = dict[str, int] | tuple[str, ...]


@dataclass(frozen=True)
class Teacher:
    """A frozen network.

    `load_teacher` returns one; `load_teachers` matches it to an image folder.

    Attributes:
        classes: width of its output, before `columns`; 0 without a classifier.
        precision: of its forward pass. digest: SHA-256 of its weights.
        class_map: maps its outputs to classes; None if unknown.
        classifier: False if its classifier is known to be untrained.
        columns: int64, outputs for the folder's classes; None for all in order.
        weight: weight in an ensemble; the weights of all teachers sum to 1.
    """

    spec: ModelSpec
    module: FeatureNetwork
    preprocessing: Preprocessing
    classes: int
    precision: Precision
    digest: str
    class_map: ClassMap | None = None
    classifier: bool = True
    columns: np.ndarray | None = None
    weight: float = 1.0

    def logits(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """float32 (B, C) logits of normalised channels-last pixels."""
        return self.outputs(pixels_B3HW).logits

    def outputs(self, pixels_B3HW: torch.Tensor) -> Outputs:
        """Features and logits (float32, for the folder's classes), without gradients."""
        with torch.no_grad(), autocast(self.precision, pixels_B3HW.device):
            outputs = self.module(pixels_B3HW)
        logits_BC = outputs.logits.float()
        if self.columns is not None:
            logits_BC = logits_BC[:, torch.from_numpy(self.columns).to(logits_BC.device)]
        return replace(outputs, logits=logits_BC)

    def facts(self) -> dict[str, Any]:
        """Everything that determines its outputs, as recorded in a store."""
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


Network = str | ModelSpec | nn.Module | Teacher  # accepted as a teacher


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """torch's autocast; disabled for float32."""
    if precision == "float32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def load_teacher(
    network: str | ModelSpec | nn.Module,
    *,
    weights: Path | str | None = None,
    size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: Literal["bilinear", "bicubic"] | None = None,
    name: str | None = None,
    class_map: ClassMap | Path | str | None = None,
    precision: Precision = "float32",
    device: torch.device | str | None = None,
) -> Teacher:
    """A frozen teacher: a network of timm or torchvision by name, or any module.

    A module is copied, so the caller's is unchanged; the copy runs in float32 (or in `precision`
    under autocast). Its forward pass takes float32 pixels (B, 3, height, width), normalised by mean
    and std, and returns logits (B, C). The preprocessing of a timm module comes from its
    `pretrained_cfg`; any other module may have a dict of that name with the same keys. Arguments
    given here take precedence. A store records the name and the SHA-256 of the weights: give
    different architectures different names.

    Args:
        network: NAME, NAME=FILE, `torchvision:NAME` or a run folder, as for `--teacher`; or a
            module.
        weights: a file of weights, .safetensors or a plain torch state dict.
        size: of the input in pixels, one side or (height, width).
        mean, std: per channel, of pixels scaled to 0..1.
        interpolation: for resizing crops to `size`; default: the module's, or bilinear.
        name: of a module; default: its class name. `PACKAGE.MODULE:FUNCTION`, if that function
            returns it, lets `fkdpipe verify --teacher python:...` run it again.
        class_map: maps outputs to classes: the class names in the order of the outputs, a dict
            from name to output, or a file with either (`read_class_map`). Default: the names in
            the weights, ImageNet's synset ids, or the order of the image folder's classes.
        precision: float32, bfloat16 or float16.
        device: None leaves it where it is; `generate` moves it to its device.

    Raises:
        UsageError: invalid name or precision.
        ModelError: unknown name, unreadable weights, a module of unknown size, mean or std, or
            one that does not return logits (B, C).

    Example:
        >>> teacher = load_teacher(network, size=224, mean=(0.5,) * 3, std=(0.5,) * 3, name="ours")
    """
    if precision not in get_args(Precision):
        raise UsageError(f"precision must be one of {', '.join(get_args(Precision))}.")
    options: dict[str, Any] = {"mean": mean, "std": std, "interpolation": interpolation}
    options = {key: value for key, value in options.items() if value is not None}
    size = (size, size) if isinstance(size, int) else size
    file = None if weights is None else Path(weights)
    if isinstance(network, nn.Module):
        loaded = models.adopt(*_copy(network, name, file), size=size, **options)
    elif name is not None:
        raise UsageError(f"name is only for modules; {network} already has one.")
    else:
        spec = models.parse_spec(network) if isinstance(network, str) else network
        spec = spec if file is None else replace(spec, weights=file)
        loaded = models.build(spec, size=None if size is None else (size[0], size[1]))
        loaded = replace(loaded, preprocessing=replace(loaded.preprocessing, **options))
    return _frozen(loaded, _read(class_map), precision, device)


def _copy(network: nn.Module, name: str | None, file: Path | None) -> tuple[nn.Module, ModelSpec]:
    """A float32 copy of a module with loaded weights, and its spec."""
    name = name or type(network).__name__
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._:+-]{0,99}", name):
        raise UsageError(
            f"invalid teacher name {name!r}: use letters, digits, '.', '_', ':', '+' and '-'."
        )
    module = copy.deepcopy(network).float()
    if file is not None:
        weight_files.load_state(module, weight_files.read_weights(file), where=str(file))
    return module, ModelSpec(name, "python")


def _read(class_map: ClassMap | Path | str | None) -> ClassMap | None:
    return read_class_map(Path(class_map)) if isinstance(class_map, (str, Path)) else class_map


def _frozen(
    loaded: Loaded,
    class_map: ClassMap | None,
    precision: Precision,
    device: torch.device | str | None,
) -> Teacher:
    digest = weight_files.state_digest(loaded.module)
    network = loaded.module.requires_grad_(False).to(device)
    return Teacher(
        spec=loaded.spec,
        module=FeatureNetwork(network.to(memory_format=torch.channels_last), Needs()).eval(),
        preprocessing=loaded.preprocessing,
        classes=loaded.classes,
        class_map=class_map or loaded.class_names or None,
        classifier=loaded.classifier,
        precision=precision,
        digest=digest,
    )


def load_teachers(
    networks: Sequence[Network],
    *,
    class_names: Sequence[str],
    weights: Sequence[float] = (),
    class_maps: Sequence[ClassMap | Path] = (),
    precision: Precision = "float32",
    device: torch.device | None = None,
    needs: Needs = Needs(),
    size: tuple[int, int] | None = None,
) -> list[Teacher]:
    """Build, load and freeze teachers, and match their outputs to an image folder's classes.

    Args:
        networks: a Teacher keeps its precision, size and class map.
        class_names: of the image folder; each teacher must have outputs for them. Empty if no
            classes are needed.
        weights: relative weights, one per teacher; equal if empty.
        class_maps: none, one for all, or one per teacher.
        needs: feature layers of each teacher.
        size: of the input (height, width) in pixels; None uses each network's own.

    Raises:
        UsageError: the number of weights or maps does not match.
        ModelError: as `load_teacher`; classes that cannot be matched, or no trained classifier.
    """
    if not networks:
        raise UsageError("name at least one teacher.")
    if weights and len(weights) != len(networks):
        raise UsageError(f"{len(weights)} teacher weights for {len(networks)} teachers.")
    if not all(0 < weight < float("inf") for weight in weights):
        raise UsageError("teacher weights must be positive numbers.")
    if len(class_maps) not in (0, 1, len(networks)):
        raise UsageError(f"{len(class_maps)} class maps for {len(networks)} teachers.")
    maps: list[ClassMap | Path | None] = list(class_maps) or [None]
    maps = maps * len(networks) if len(maps) == 1 else maps
    shares = [float(w) for w in weights] or [1.0] * len(networks)
    teachers = []
    for network, share, class_map in zip(networks, shares, maps, strict=True):
        if isinstance(network, Teacher):
            teacher = replace(network, class_map=_read(class_map) or network.class_map)
            if needs.pre:  # removes the last activation, so copy the caller's network
                teacher = replace(teacher, module=copy.deepcopy(network.module))
        else:
            teacher = load_teacher(network, size=size, class_map=class_map, precision=precision)
        module = FeatureNetwork(teacher.module.network, needs).eval().to(device)
        if class_names:
            check_classifier(teacher)
        columns = None
        if teacher.spec.library not in models.SELF_SUPERVISED:  # outputs are not classes
            columns = match_classes(
                class_names, teacher.classes, teacher.class_map, teacher=str(teacher.spec)
            )
        teachers.append(
            replace(teacher, module=module, columns=columns, weight=share / sum(shares))
        )
    if len(precisions := {teacher.precision for teacher in teachers}) > 1:
        raise UsageError(
            f"the teachers have different precisions: {', '.join(sorted(precisions))}."
        )
    return teachers


def check_classifier(teacher: Teacher) -> None:
    """Refuse a network that cannot predict classes.

    Raises:
        ModelError: no classifier, or an untrained one.
    """
    if not teacher.classes:
        raise ModelError(
            f"{teacher.spec} has no classifier, so it cannot label images. It can provide "
            "features: --form none --features post.",
            code="no-classifier",
        )
    if not teacher.classifier:
        raise ModelError(
            f"{teacher.spec}: its classifier was not trained, because its run learnt features "
            "only. It can provide features, or be evaluated with `fkdpipe transfer`.",
            code="no-classifier",
        )


def numbered_classes(class_names: Sequence[str]) -> dict[str, int]:
    """A class map for folders named by class index, "0" to "999" (ImageNet-V2).

    Raises:
        UsageError: a folder has another name.
    """
    others = [name for name in class_names if not name.isdigit()]
    if others:
        raise UsageError(f"folders must be named by class index; found {others[0]!r}.")
    return {name: int(name) for name in class_names}


def read_class_map(path: Path) -> dict[str, int] | tuple[str, ...]:
    """Read a file that maps a teacher's outputs to classes.

    One column: the teacher's class names, one per line, in the order of its outputs.
    Two columns (tab or spaces): a folder's class name and the index of its output.

    Returns:
        A tuple of names, or a dict from folder class to output index.

    Raises:
        UsageError: a URL, unreadable, or in neither form.
    """
    path = disk.local_path(path)
    disk.refuse_pointer(path, UsageError)
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
    class_map: ClassMap | None,
    *,
    teacher: str,
) -> np.ndarray | None:
    """Match a teacher's outputs to the folder's classes.

    Uses the class map, which may come from the checkpoint; else ImageNet's synset ids, for 1,000
    outputs and folders named by them; else the order, if the numbers agree.

    Args:
        class_names: of the folder; empty (unlabelled images) keeps all outputs.

    Returns:
        int64 (C,), the output of each class, or None for all outputs in order.

    Raises:
        ModelError: they cannot be matched; says what to provide.
    """
    if not class_names:
        return None
    if class_map is None and outputs == 1000:
        synsets = tuple(ImageNetInfo().label_names())
        if set(class_names) <= set(synsets):
            class_map = synsets
    if class_map is None:
        if outputs != len(class_names):
            raise ModelError(
                f"{teacher} has {outputs} outputs, the image folder {len(class_names)} classes. "
                "Map outputs to classes with --class-map FILE: the teacher's class names in the "
                "order of its outputs, or 'class index' on each line.",
                code="classes-differ",
            )
        return None
    if not isinstance(class_map, dict):
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
            f"{teacher}: the class map names output {columns.max()}, but there are {outputs}.",
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
