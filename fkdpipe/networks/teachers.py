"""Frozen teachers with their own input size, interpolation, normalisation and precision.

A teacher is always in eval mode and its weights have no gradients. An ensemble averages the
probabilities at one temperature; each teacher sees the same crops at its own size.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from fkdpipe.common.distributed import choose_device
from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks import class_maps as class_maps_
from fkdpipe.networks import models, weight_files
from fkdpipe.networks.class_maps import ClassMap
from fkdpipe.networks.feature_layers import FeatureNetwork, Needs, Outputs
from fkdpipe.networks.models import Loaded, ModelSpec, Preprocessing
from fkdpipe.networks.preprocessing import sides

Precision = Literal["float32", "bfloat16", "float16"]


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


def as_networks(given: Any) -> list[Network]:
    """One network or several, paths as text.

    Raises:
        UsageError: something that is none.
    """
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    networks = [os.fspath(n) if isinstance(n, os.PathLike) else n for n in several]
    for network in networks:
        if not isinstance(network, Network) or isinstance(network, type):
            raise UsageError(
                "a network must be a name, a path, a torch.nn.Module or what load_teacher "
                f"returns; found {network!r}."
            )
    return networks


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """torch's autocast; disabled for float32."""
    if precision == "float32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def load_teacher(
    network: str | os.PathLike[str] | ModelSpec | nn.Module,
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
            from name to output, or a file with either (`class_maps.read`). Default: the names in
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
    (given,) = as_networks(network)
    if isinstance(given, Teacher):
        raise UsageError("this is a teacher already; give its options where it is loaded.")
    device = None if device is None else choose_device(device)
    if precision not in get_args(Precision):
        raise UsageError(f"precision must be one of {', '.join(get_args(Precision))}.")
    if interpolation not in (None, "bilinear", "bicubic"):
        raise UsageError(f"interpolation must be bilinear or bicubic; found {interpolation!r}.")
    options: dict[str, Any] = {"mean": mean, "std": std, "interpolation": interpolation}
    options = {key: value for key, value in options.items() if value is not None}
    size = None if size is None else sides(size)
    file = None if weights is None else Path(weights)
    if isinstance(given, nn.Module):
        loaded = models.adopt(*_copy(given, name, file), size=size, **options)
    elif name is not None:
        raise UsageError(f"name is only for modules; {given} already has one.")
    else:
        spec = models.parse_spec(given) if isinstance(given, str) else given
        spec = spec if file is None else replace(spec, weights=file)
        loaded = models.build(spec, size=size)
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
    return class_maps_.read(Path(class_map)) if isinstance(class_map, (str, Path)) else class_map


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


def not_finite(name: str, precision: Precision) -> ModelError:
    """The error of a network whose outputs are NaN or infinite."""
    return ModelError(
        f"{name} gives values that are not finite at precision {precision}. Either its weights "
        "hold such values, or they overflow: use --precision bfloat16 or float32.",
        code="not-finite",
    )


def load_teachers(
    networks: Sequence[Network],
    *,
    class_names: Sequence[str],
    weights: Sequence[float] = (),
    class_maps: Sequence[ClassMap | Path] = (),
    numbered: bool = False,
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
        numbered: the class folders are named by output index.
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
    if numbered and class_maps:
        raise UsageError("--numbered and --class-map exclude each other; give one of them.")
    class_maps = [class_maps_.numbered_classes(class_names)] if numbered else class_maps
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
            columns = class_maps_.match_classes(
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


def average(
    logits: Sequence[torch.Tensor], shares: Sequence[float], temperature: float
) -> torch.Tensor:
    """float32 (B, C) log-probabilities of an ensemble: log sum_i share_i softmax(z_i / T)."""
    parts = [
        torch.log_softmax(z / temperature, dim=1) + np.log(share)
        for z, share in zip(logits, shares, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.logsumexp(torch.stack(parts), dim=0)
