"""Frozen teachers: their own input size, interpolation and normalisation, their own precision.

A teacher is always in eval mode and without gradients to its weights. Several are averaged as
probabilities at one temperature, each seeing the same crops at its own size.
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

from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks import models, weight_files
from fkdpipe.networks.feature_layers import FeatureNetwork, Needs, Outputs
from fkdpipe.networks.models import Loaded, ModelSpec, Preprocessing

Precision = Literal["float32", "bfloat16", "float16"]
ClassMap = dict[str, int] | tuple[str, ...]


@dataclass(frozen=True)
class Teacher:
    """One frozen network.

    `load_teacher` makes one, `load_teachers` fits it to an image folder.

    Attributes:
        classes: width of its output, before `columns`; 0 without a classifier.
        precision: of its computation. digest: sha256 of its weights.
        class_map: which of its outputs is which class, where that is known.
        classifier: False where the weights say that nothing trained its classifier.
        columns: int64, which outputs are the folder's classes, None for all in order.
        weight: share in an ensemble; the shares of all teachers sum to 1.
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


Network = str | ModelSpec | nn.Module | Teacher  # what can teach


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """torch's autocast at a precision; float32 switches it off."""
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

    A module is copied, so that the caller's own stays as it is; the copy computes in float32 (or
    in `precision` under autocast). Its forward pass takes float32 pixels (B, 3, height, width),
    normalised by mean and std, and gives scores before softmax, (B, C). Of a timm module its
    `pretrained_cfg` says what it takes; so does a dict of that name and form on any other module.
    What is given here goes before. The sha256 of the weights and the name are what a store
    records: give another name to another architecture.

    Args:
        network: NAME, NAME=FILE, `torchvision:NAME` or a run folder, as for `--teacher`; or a
            module.
        weights: a file of weights, .safetensors or a plain torch state dict.
        size: of the input in pixels, a side or (height, width).
        mean, std: per channel, of pixels scaled to 0..1.
        interpolation: of the resize of a crop to `size`; of a module that does not say, bilinear.
        name: of a module; by default that of its class. `PACKAGE.MODULE:FUNCTION`, where that
            function returns it, lets `fkdpipe verify --teacher python:...` run it again.
        class_map: which output is which class: the names in the order of the outputs, a dict from
            name to output, or a file of either (`read_class_map`). By default what the weights
            say, ImageNet's synset ids, or the order of the image folder's classes.
        precision: float32, bfloat16 or float16.
        device: None leaves it where it is; `generate` moves it to its own.

    Raises:
        UsageError: a name or a precision that cannot be right.
        ModelError: unknown name, unreadable weights, a module whose size, mean and std nobody
            says, or one that gives no scores (B, C).

    Example:
        >>> teacher = load_teacher(network, size=224, mean=(0.5,) * 3, std=(0.5,) * 3, name="ours")
    """
    if precision not in get_args(Precision):
        raise UsageError(f"precision must be one of {', '.join(get_args(Precision))}.")
    given: dict[str, Any] = {"mean": mean, "std": std, "interpolation": interpolation}
    given = {key: value for key, value in given.items() if value is not None}
    size = (size, size) if isinstance(size, int) else size
    file = None if weights is None else Path(weights)
    if isinstance(network, nn.Module):
        loaded = models.adopt(*_copy(network, name, file), size=size, **given)
    elif name is not None:
        raise UsageError(f"name is for a module that is handed over; {network} has its own.")
    else:
        spec = models.parse_spec(network) if isinstance(network, str) else network
        spec = spec if file is None else replace(spec, weights=file)
        loaded = models.build(spec, size=None if size is None else (size[0], size[1]))
        loaded = replace(loaded, preprocessing=replace(loaded.preprocessing, **given))
    return _frozen(loaded, _read(class_map), precision, device)


def _copy(network: nn.Module, name: str | None, file: Path | None) -> tuple[nn.Module, ModelSpec]:
    """A module of its own for a teacher, in float32 and filled, and how it is called."""
    name = name or type(network).__name__
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._:+-]{0,99}", name):
        raise UsageError(
            f"{name!r} cannot name a teacher: take letters, digits, '.', '_', '+' and '-'."
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
    """Build, fill and freeze teachers, and match their outputs to an image folder's classes.

    Args:
        networks: a Teacher keeps its precision, size and class map.
        class_names: of the image folder; each teacher must have outputs for them. Empty where no
            classes are asked for.
        weights: relative shares, one per teacher; equal when empty.
        class_maps: none, one for all, or one per teacher.
        needs: what is asked of each beside logits.
        size: of the input (height, width) in pixels; None takes each network's own.

    Raises:
        UsageError: numbers of weights or maps that do not fit.
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
            one = replace(network, class_map=_read(class_map) or network.class_map)
            if needs.pre:  # takes the last activation out; the caller's network stays whole
                one = replace(one, module=copy.deepcopy(network.module))
        else:
            one = load_teacher(network, size=size, class_map=class_map, precision=precision)
        module = FeatureNetwork(one.module.network, needs).eval().to(device)
        if class_names:
            check_classifier(one)
        columns = None
        if one.spec.library not in models.SELF_SUPERVISED:  # whose outputs are no classes
            columns = match_classes(class_names, one.classes, one.class_map, teacher=str(one.spec))
        teachers.append(replace(one, module=module, columns=columns, weight=share / sum(shares)))
    if len(found := {one.precision for one in teachers}) > 1:
        raise UsageError(f"the teachers have different precisions: {', '.join(sorted(found))}.")
    return teachers


def check_classifier(teacher: Teacher) -> None:
    """Refuse to ask for classes of a network that has none.

    Raises:
        ModelError: no classifier, or one that nothing trained.
    """
    if not teacher.classes:
        raise ModelError(
            f"{teacher.spec} has no classifier, so it gives no labels. It can give features: "
            "--form none --features post.",
            code="no-classifier",
        )
    if not teacher.classifier:
        raise ModelError(
            f"{teacher.spec}: its classifier was never trained, because its run learnt features "
            "alone. It can lend features, or be judged by `fkdpipe transfer`.",
            code="no-classifier",
        )


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
    class_map: ClassMap | None,
    *,
    teacher: str,
) -> np.ndarray | None:
    """Which outputs of a teacher are the folder's classes.

    By the class map, which may come from its checkpoint; else, for 1,000 outputs and folders named
    by ImageNet's synset ids, by those; else by position when the numbers agree.

    Args:
        class_names: of the folder; empty (unlabelled images) keeps all outputs.

    Returns:
        int64 (C,), or None when it is all outputs in order.

    Raises:
        ModelError: no way to match them; says what to give.
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
                "Say which output is which class with --class-map FILE: the teacher's class names "
                "in the order of its outputs, or 'class index' on each line.",
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
