"""Image classifiers by name: built by timm or torchvision, filled with weights.

Both teachers and students start here. A model is written NAME (pretrained weights from the
library's hub) or NAME=FILE (a local checkpoint); `torchvision:NAME` takes torchvision's model of
that name, a run folder of `fkdpipe train` names the student in it.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import timm
import torch
import torchvision
from timm.data import resolve_model_data_config
from torch import nn

from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks import selfsupervised
from fkdpipe.networks.weight_files import (
    EXPORT_NAME,
    first_line,
    load_state,
    read_export,
    read_weights,
)

Library = Literal["timm", "torchvision", "moco", "swav"]
SELF_SUPERVISED = ("moco", "swav")  # whose outputs are no classes


@dataclass(frozen=True)
class ModelSpec:
    """A model as a user writes it.

    Attributes:
        weights: a local checkpoint; None for the library's pretrained weights.
    """

    name: str
    library: Library = "timm"
    weights: Path | None = None

    def __str__(self) -> str:
        name = self.name if self.library == "timm" else f"{self.library}:{self.name}"
        return name if self.weights is None else f"{name}={self.weights}"


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become a network's input.

    Attributes:
        size: (height, width) in pixels. crop_pct: share of the resized image that evaluation
            keeps (centre crop). interpolation: "bilinear" or "bicubic". mean, std: per channel,
            of pixels scaled to 0..1.
    """

    size: tuple[int, int]
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float = 0.875


@dataclass(frozen=True)
class Loaded:
    """A built model.

    Attributes:
        classes: width of its output.
        class_names: of its outputs where the checkpoint tells, else empty.
        classifier: False where the checkpoint says that nothing trained its classifier.
    """

    module: nn.Module
    preprocessing: Preprocessing
    classes: int
    class_names: tuple[str, ...] = ()
    classifier: bool = True


def parse_spec(text: str) -> ModelSpec:
    """`NAME`, `NAME=FILE`, `torchvision:NAME[=FILE]`, `moco:NAME=FILE` or a run folder.

    Raises:
        UsageError: empty name.
        ModelError: unknown name (with near matches), or no such file.
    """
    if Path(text, EXPORT_NAME).is_file():
        file = Path(text, EXPORT_NAME)
        name = read_export(file).get("student")
        if not name:
            raise ModelError(f"{file} does not say which model it is; write NAME={file}.")
        return ModelSpec(name, "timm", file)
    if Path(text).is_dir() and not timm.is_model(text):
        raise ModelError(
            f"{text} is a folder without {EXPORT_NAME}, which a run writes at its end. Name the "
            "folder of a finished run, or NAME=FILE.",
            code="no-weights",
        )
    name, _, file_text = text.partition("=")
    if not name:
        raise UsageError(f"{text!r} names no model; write NAME or NAME=FILE.")
    library: Library = "timm"
    for other in get_args(Library):
        if name.startswith(f"{other}:"):
            library, name = other, name.removeprefix(f"{other}:")
    _check_name(name, library)
    if not file_text:
        if library in SELF_SUPERVISED:
            raise UsageError(f"{text}: name the authors' checkpoint, {text}=FILE.")
        return ModelSpec(name, library)
    if not Path(file_text).is_file():
        raise ModelError(f"{name}: no such weights file: {file_text}.", code="no-weights")
    return ModelSpec(name, library, Path(file_text))


def _check_name(name: str, library: str) -> None:
    if library != "torchvision":
        if name.startswith(("hf-hub:", "hf_hub:")):
            return
        plain, _, tag = name.partition(".")
        if timm.is_model(plain):
            known = timm.list_pretrained(f"{plain}.*")
            if tag and name not in known:
                raise ModelError(
                    f"timm has no weights {name!r}; it has {', '.join(known) or 'none of it'}.",
                    code="unknown-model",
                )
            return
        known = timm.list_models()
    else:
        known = torchvision.models.list_models(module=torchvision.models)
        if name in known:
            return
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise ModelError(f"{library} has no model {name!r}.{hint}", code="unknown-model")


def build(
    spec: ModelSpec,
    *,
    classes: int | None = None,
    size: tuple[int, int] | None = None,
    pretrained: bool = True,
    new_head: bool = False,
    options: dict[str, Any] | None = None,
) -> Loaded:
    """Make a model and fill it.

    Args:
        classes: width of the output; None takes that of the weights.
        size: (height, width) of the input; None takes that of the weights. Networks with
            position embeddings are built for it.
        pretrained: without a weights file, fetch the library's; False leaves it at random.
        new_head: leave the classifier at random, whatever the weights file has.
        options: further arguments of timm's `create_model` (drop_path_rate, ...).

    Raises:
        ModelError: weights cannot be fetched, read, or do not fit; the message names keys.
    """
    if spec.library in SELF_SUPERVISED:
        return _self_supervised(spec, size)
    state = read_weights(spec.weights) if spec.weights else None
    facts = read_export(spec.weights) if spec.weights else {}
    options = {**facts.get("options", {}), **(options or {})}
    export_size = tuple(facts["size"]) if "size" in facts else None
    size = size or cast("tuple[int, int] | None", export_size)
    fetch = pretrained and state is None
    module = _create(spec, classes=classes, size=size, pretrained=fetch, options=options)
    if state is not None:
        width = _width_of(state, module)
        if classes is None and width is not None and width != _classes(module):
            module = _create(spec, classes=width, size=size, pretrained=False, options=options)
        if new_head:
            state = _without_head(state, module)
        load_state(module, state, where=str(spec))
    preprocessing = _preprocessing(spec, module)
    if facts:
        known: dict[str, Any] = {k: facts[k] for k in ("interpolation", "crop_pct") if k in facts}
        known |= {k: tuple(facts[k]) for k in ("mean", "std") if k in facts}
        preprocessing = replace(preprocessing, **known)
    if size is not None:
        preprocessing = replace(preprocessing, size=size)
    return Loaded(
        module,
        preprocessing,
        _classes(module),
        tuple(facts.get("class_names", ())),
        bool(facts.get("classifier", True)),
    )


def _self_supervised(spec: ModelSpec, size: tuple[int, int] | None) -> Loaded:
    assert spec.weights is not None
    state = read_weights(spec.weights)
    kind = cast('Literal["moco", "swav"]', spec.library)
    module, state = selfsupervised.build(kind, spec.name, state, where=str(spec))
    load_state(module, state, where=str(spec))
    preprocessing = _preprocessing(spec, module.backbone)
    if size is not None:
        preprocessing = replace(preprocessing, size=size)
    return Loaded(module, preprocessing, module.num_classes)


def _create(
    spec: ModelSpec,
    *,
    classes: int | None,
    size: tuple[int, int] | None,
    pretrained: bool,
    options: dict[str, Any],
) -> nn.Module:
    try:
        if spec.library == "torchvision":
            width = {} if classes is None else {"num_classes": classes}
            weights = "DEFAULT" if pretrained else None
            if pretrained and classes is not None:
                raise ModelError(f"{spec}: pretrained weights have their own number of classes.")
            with _tensors_only():
                return torchvision.models.get_model(spec.name, weights=weights, **width, **options)
        extra = dict(options)
        if classes is not None:
            extra["num_classes"] = classes
        if size is not None and _needs_size(spec.name):
            extra["img_size"] = size
        return timm.create_model(spec.name, pretrained=pretrained, **extra)
    except ModelError:
        raise
    except Exception as error:
        if pretrained and not isinstance(error, (TypeError, AssertionError)):
            raise ModelError(
                f"{spec}: its pretrained weights could not be fetched "
                f"({type(error).__name__}: {first_line(error)}). Without a network, give a local "
                f"file: {spec}=weights.safetensors.",
                code="offline",
            ) from error
        raise ModelError(f"{spec} cannot be built: {first_line(error)}") from error


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Inside, `torch.load` unpickles tensors alone; torchvision asks it to run what it fetched."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _needs_size(name: str) -> bool:
    """Is the network built for one input size (position embeddings, relative windows)?"""
    config = timm.get_pretrained_cfg(name.removeprefix("hf-hub:").removeprefix("hf_hub:"))
    return bool(config is not None and config.fixed_input_size)


def classifier_name(module: nn.Module) -> str:
    """State-dict prefix of the last linear layer."""
    config = getattr(module, "pretrained_cfg", None)
    name = config.get("classifier") if config else None
    if isinstance(name, (tuple, list)):
        name = name[0]
    if name:
        return str(name)
    linears = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    return linears[-1] if linears else ""


def _classes(module: nn.Module) -> int:
    width = getattr(module, "num_classes", None)
    if width is not None:
        return int(width)
    linear = module.get_submodule(classifier_name(module))
    return int(linear.out_features)  # type: ignore[arg-type]


def _width_of(state: dict[str, torch.Tensor], module: nn.Module) -> int | None:
    name = classifier_name(module)
    for key in (f"{name}.weight", f"{name}.fc.weight"):
        if key in state:
            return int(state[key].shape[0])
    return None


def _without_head(state: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict whose classifiers are the module's own."""
    config = getattr(module, "pretrained_cfg", None) or {}
    names = config.get("classifier") or classifier_name(module)
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    kept = {key: value for key, value in state.items() if not key.startswith(heads)}
    return kept | {k: v for k, v in module.state_dict().items() if k.startswith(heads)}


def _preprocessing(spec: ModelSpec, module: nn.Module) -> Preprocessing:
    if spec.library == "torchvision":
        ways = torchvision.models.get_model_weights(spec.name).DEFAULT.transforms()
        side = ways.crop_size[0]
        return Preprocessing(
            size=(side, side),
            interpolation=_interpolation(ways.interpolation.value),
            mean=tuple(ways.mean),
            std=tuple(ways.std),
            crop_pct=side / ways.resize_size[0],
        )
    config = resolve_model_data_config(module)
    return Preprocessing(
        size=tuple(config["input_size"][1:]),
        interpolation=_interpolation(config["interpolation"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_pct=float(config["crop_pct"]),
    )


def _interpolation(name: str) -> Literal["bilinear", "bicubic"]:
    return "bicubic" if name == "bicubic" else "bilinear"
