"""Build image classifiers by name, from timm or torchvision, and load their weights.

Used for teachers and students. A model is NAME (pretrained weights from the library's hub) or
NAME=FILE (a local checkpoint); `torchvision:NAME` is torchvision's model of that name, and a run
folder of `fkdpipe train` stands for its student. Any other network is a module passed in Python, or
`python:PACKAGE.MODULE:FUNCTION`, a function that returns one.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import timm
import torchvision
from timm.data import resolve_model_data_config
from torch import nn

from fkdpipe.common import disk
from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks import classifiers, foreign, selfsupervised
from fkdpipe.networks.preprocessing import Preprocessing
from fkdpipe.networks.weight_files import (
    EXPORT_NAME,
    check_options,
    first_line,
    load_state,
    read_export,
    read_weights,
    split_entry,
)

Library = Literal["timm", "torchvision", "moco", "swav", "python"]
SELF_SUPERVISED = ("moco", "swav")  # outputs are not classes


@dataclass(frozen=True)
class ModelSpec:
    """A model as specified by the user.

    Attributes:
        name: of the model; for Python networks PACKAGE.MODULE:FUNCTION or the module's name.
        weights: a local checkpoint; None for the library's pretrained weights.
    """

    name: str
    library: Library = "timm"
    weights: Path | None = None

    def __str__(self) -> str:
        name = self.name if self.library == "timm" else f"{self.library}:{self.name}"
        return name if self.weights is None else f"{name}={self.weights}"


@dataclass(frozen=True)
class Loaded:
    """A built model.

    Attributes:
        classes: width of its output; 0 without a classifier.
        class_names: of its outputs, if the checkpoint has them; else empty.
        classifier: False if the checkpoint records that its classifier was not trained.
    """

    spec: ModelSpec
    module: nn.Module
    preprocessing: Preprocessing
    classes: int
    class_names: tuple[str, ...] = ()
    classifier: bool = True


def parse_spec(text: str, *, allow_python: bool = False) -> ModelSpec:
    """Parse `NAME`, `NAME=FILE`, `torchvision:NAME[=FILE]`, `moco:NAME=FILE`, a run folder, or
    `python:PACKAGE.MODULE:FUNCTION[=FILE]`.

    Args:
        allow_python: whether `text` may name a function, which would be run. Only for command
            line arguments, never for names in a recipe, a store or a run folder, which may come
            from others.

    Raises:
        UsageError: empty name, a URL, or a function that is not allowed.
        ModelError: unknown name (with close matches), or no such file.
    """
    disk.local_path(text.partition("=")[2] or text)
    if Path(text, EXPORT_NAME).is_file():
        return _of_run(Path(text, EXPORT_NAME))
    if Path(text).is_dir() and not timm.is_model(text):
        raise ModelError(
            f"{text} is a folder without {EXPORT_NAME}, which a run writes when it ends. Name the "
            "folder of a finished run, or NAME=FILE.",
            code="no-weights",
        )
    name, _, file_text = text.partition("=")
    if not name:
        raise UsageError(f"invalid model {text!r}; write NAME or NAME=FILE.")
    library: Library = "timm"
    for other in get_args(Library):
        if name.startswith(f"{other}:"):
            library, name = other, name.removeprefix(f"{other}:")
    if library == "python" and not allow_python:
        raise UsageError(
            f"{text} names code to run, which is allowed only in the arguments --teacher, "
            "--student and MODEL, never in a recipe, --set, a store or a run folder. In Python, "
            "pass the module itself."
        )
    _check_name(name, library)
    if not file_text:
        if library in SELF_SUPERVISED:
            raise UsageError(f"{text}: give the authors' checkpoint, {text}=FILE.")
        return ModelSpec(name, library)
    if not split_entry(Path(file_text))[0].is_file():
        raise ModelError(f"{name}: no such weights file: {file_text}.", code="no-weights")
    return ModelSpec(name, library, Path(file_text))


def _of_run(file: Path) -> ModelSpec:
    """The exported student of a run."""
    name = read_export(file).get("student")
    if not name:
        raise ModelError(f"{file} does not say which model it is; write NAME={file}.")
    if name.startswith("python:"):
        raise ModelError(
            f"{file} holds the weights of {name}, which is code. A run folder may come from "
            f"others, so the code runs only if you name it: {name}={file}.",
            code="names-code",
        )
    return ModelSpec(name, "timm", file)


def _check_name(name: str, library: str) -> None:
    if library == "python":
        package, colon, function = name.partition(":")
        if not (package and colon and function):
            raise UsageError(f"python:{name}: write python:PACKAGE.MODULE:FUNCTION[=FILE].")
        return
    if library != "torchvision":
        if name.startswith(("hf-hub:", "hf_hub:")):
            return
        plain, _, tag = name.partition(".")
        if timm.is_model(plain):
            known = timm.list_pretrained(f"{plain}.*")
            if tag and name not in known:
                raise ModelError(
                    f"timm has no weights {name!r}; it has {', '.join(known) or 'none for it'}.",
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
    """Build a model and load its weights.

    Args:
        classes: width of the output; None uses that of the weights.
        size: (height, width) of the input; None uses that of the weights. Networks with position
            embeddings are built for it.
        pretrained: without a weights file, fetch the library's; False leaves it random.
        new_head: keep the classifier random and ignore that of the weights file.
        options: extra arguments of timm's `create_model` (drop_path_rate, ...).

    Raises:
        ModelError: weights cannot be fetched or read, or do not fit; the message names keys.
    """
    if spec.library in SELF_SUPERVISED:
        return _self_supervised(spec, size)
    if spec.library == "python":
        return _python(spec, classes=classes, size=size, new_head=new_head, options=options or {})
    state = read_weights(spec.weights) if spec.weights else None
    facts = read_export(spec.weights) if spec.weights else {}
    options = {**facts.get("options", {}), **(options or {})}
    check_options(options, where=str(spec))
    export_size = tuple(facts["size"]) if "size" in facts else None
    size = size or cast("tuple[int, int] | None", export_size)
    fetch = pretrained and state is None
    module = _create(spec, classes=classes, size=size, pretrained=fetch, options=options)
    if state is not None:
        width = classifiers.classes_in(state, module, spec.library)
        if classes is None and width is not None and width != classifiers.count_classes(module):
            module = _create(spec, classes=width, size=size, pretrained=False, options=options)
        if new_head:
            state = classifiers.keep_own(state, module)
        load_state(module, state, where=str(spec))
    preprocessing = _preprocessing(spec, module)
    if facts:
        known: dict[str, Any] = {k: facts[k] for k in ("interpolation", "crop_pct") if k in facts}
        known |= {k: tuple(facts[k]) for k in ("mean", "std") if k in facts}
        preprocessing = replace(preprocessing, **known)
    if size is not None:
        preprocessing = replace(preprocessing, size=size)
    return Loaded(
        spec,
        module,
        preprocessing,
        classifiers.count_classes(module),
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
    return Loaded(spec, module, preprocessing, module.num_classes)


def _python(
    spec: ModelSpec,
    *,
    classes: int | None,
    size: tuple[int, int] | None,
    new_head: bool,
    options: dict[str, Any],
) -> Loaded:
    """Call a user's function and load weights; an exported file provides size and classes."""
    facts = read_export(spec.weights) if spec.weights else {}
    arguments = {**facts.get("options", {}), **options}
    if (classes or facts.get("num_classes")) is not None:
        arguments["num_classes"] = classes or facts["num_classes"]
    module = foreign.call(spec.name, **arguments)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{spec} returned {type(module).__name__}, not a torch.nn.Module.")
    if spec.weights is not None:
        state = read_weights(spec.weights)
        state = classifiers.keep_own(state, module) if new_head else state
        load_state(module, state, where=str(spec))
    known = {name: facts.get(name) for name in ("mean", "std", "interpolation")}
    loaded = adopt(module, spec, size=size or facts.get("size"), **known)
    if classes is not None and loaded.classes != classes:
        raise ModelError(
            f"{spec} has {loaded.classes} outputs, but the data has {classes} classes. Let the "
            "function take num_classes, and build the network for it.",
            code="classes-differ",
        )
    names, classifier = facts.get("class_names", ()), facts.get("classifier", True)
    return replace(loaded, class_names=tuple(names), classifier=classifier)


def adopt(
    module: nn.Module,
    spec: ModelSpec,
    *,
    size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
) -> Loaded:
    """Use a module as it is, with the preprocessing given here or in its `pretrained_cfg`.

    Only the interpolation has a default (bilinear): a wrong mean would silently spoil every label.

    Raises:
        ModelError: size, mean or std are unknown, or the module does not run.
    """
    size = (size, size) if isinstance(size, int) else size
    arguments = {"size": size, "mean": mean, "std": std, "interpolation": interpolation}
    known = {"interpolation": "bilinear", **foreign.data_config(module)}
    known |= {key: value for key, value in arguments.items() if value is not None}
    missing = [key for key in ("size", "mean", "std") if key not in known]
    if missing:
        raise ModelError(
            f"{spec} has no preprocessing: give {', '.join(missing)}. For ImageNet with "
            "torchvision's usual transforms, use load_teacher(..., size=224, "
            "mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)), or set a dict "
            "pretrained_cfg on the module, with keys input_size (3, height, width), mean and std.",
            code="no-preprocessing",
        )
    preprocessing = Preprocessing(
        size=(int(known["size"][0]), int(known["size"][1])),
        interpolation=_interpolation(known["interpolation"]),
        mean=known["mean"],
        std=known["std"],
        crop_pct=float(known.get("crop_pct", Preprocessing.crop_pct)),
    )
    count = foreign.count_outputs(module, preprocessing.size, name=str(spec))
    return Loaded(spec, module, preprocessing, count)


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
                f"{spec}: pretrained weights could not be fetched "
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
    """Whether the network is built for one input size (position embeddings, relative windows)."""
    config = timm.get_pretrained_cfg(name.removeprefix("hf-hub:").removeprefix("hf_hub:"))
    return bool(config is not None and config.fixed_input_size)


def _preprocessing(spec: ModelSpec, module: nn.Module) -> Preprocessing:
    if spec.library == "torchvision":
        transforms = torchvision.models.get_model_weights(spec.name).DEFAULT.transforms()
        side = transforms.crop_size[0]
        return Preprocessing(
            size=(side, side),
            interpolation=_interpolation(transforms.interpolation.value),
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            crop_pct=side / transforms.resize_size[0],
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
