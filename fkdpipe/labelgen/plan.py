"""Plan a run of `generate`: open or create the store, and start its parts.

Settings are compared here, before any work is done: those of a store cannot change.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import StoreMismatchError, UsageError
from fkdpipe.common.progress import Reporter, silent
from fkdpipe.labelgen import existing
from fkdpipe.labelgen.existing import Drawing
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.networks import feature_layers, features
from fkdpipe.networks.features import Basis
from fkdpipe.networks.models import SELF_SUPERVISED
from fkdpipe.networks.teachers import Teacher, check_classifier
from fkdpipe.pixels import images, replay
from fkdpipe.pixels.crops import Crops
from fkdpipe.pixels.replay import Backend, BackendChoice, Request
from fkdpipe.storage import begin, labels, schema, writer
from fkdpipe.storage import features as stored_features
from fkdpipe.storage.labels import Form
from fkdpipe.storage.location import Location
from fkdpipe.storage.schema import Field
from fkdpipe.storage.settings import CropsSettings, FeatureSettings, LabelSettings
from fkdpipe.storage.store import Part, Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundPlan:
    """One round: its crops, and the labels and features of them."""

    crops: Part[CropsSettings]
    outputs: tuple[Part, ...]

    @property
    def crops_M(self) -> int:
        return self.crops.settings.crops

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.crops, *self.outputs)


@dataclass(frozen=True)
class Plan:
    """What a run needs to know about its store.

    Attributes:
        root: folder that the keys are relative to. replay: backend of the pixels.
        basis: onto which features are projected.
    """

    store: Store
    root: Path
    rounds: tuple[RoundPlan, ...]
    replay: Backend
    basis: Basis | None = None

    @property
    def parts(self) -> list[Part]:
        return [part for round_plan in self.rounds for part in round_plan.parts]


def default_source(teachers: Sequence[Teacher]) -> str:
    """The default name of a source: the teachers' names, joined."""
    return "+".join(t.spec.name.replace(":", "-").replace("/", "-") for t in teachers)


def prepare(
    location: Location,
    data: Path,
    settings: GenerateSettings,
    teachers: Sequence[Teacher],
    *,
    device: torch.device,
    rank: Rank = Rank(),
    folder: images.ImageFolder | None = None,
    reporter: Reporter = silent,
) -> Plan:
    """Open or create the store and start the requested parts.

    Args:
        folder: the list of images, if it has been scanned already.

    Raises:
        UsageError: invalid settings (K above C, logits of an ensemble, ...).
        ModelError: the basis belongs to another teacher.
        StoreMismatchError: the store was made with other settings; says which.
        ImagesError: the folder cannot be used, or its classes are not the store's.
    """
    basis = features.load_basis(settings.basis) if settings.basis else None
    source = settings.source or default_source(teachers)
    form = _form(settings, location, source, teachers)
    templates = _templates(settings, form, teachers, basis, source)
    fields = [field for template in templates for field in template.fields]
    drawing = existing.drawing(begin.find_store(location), settings)
    store = _open_or_create(location, data, settings, drawing, fields, rank, folder, reporter)
    root = images.split_root(data, "train")
    images.check_same_classes(store.images.class_names, images.class_folders(root), where=str(data))
    backend = _backend(store, source, settings.replay, device, root)
    provenance = {
        "teachers": [str(teacher.spec.name) for teacher in teachers],
        "replay": replay.versions(backend),
        "packages": writer.package_versions(),
    }
    plans = []
    for crops in _rounds(store, settings, drawing):
        outputs = [
            writer.add_part(
                store,
                f"rounds/{crops.round}/{template.path}",
                replace(template.settings, replay=backend, crops=crops.settings.crops),
                template.fields,
                provenance=provenance,
            )
            for template in templates
        ]
        plans.append(RoundPlan(crops, tuple(outputs)))
    return Plan(store, root, tuple(plans), backend, basis)


@dataclass(frozen=True)
class _Template:
    """A part to add to every round, without the number of crops and the replay backend.

    Attributes:
        path: of the part within the round.
    """

    path: str
    settings: LabelSettings | FeatureSettings
    fields: list[Field]


def _form(
    settings: GenerateSettings, location: Location, source: str, teachers: Sequence[Teacher]
) -> Form | None:
    """The requested form, else that of this source in the store, else topk:10."""
    if settings.form == "none":
        return None
    for teacher in teachers:
        check_classifier(teacher)
    if settings.form is not None:
        return labels.parse_form(settings.form)
    store = begin.find_store(location)
    recorded = existing.form_of(store, source) if store is not None else None
    if recorded is not None:
        return recorded
    return (
        Form("logits") if _self_supervised(teachers) else Form("topk", min(10, _classes(teachers)))
    )


def _self_supervised(teachers: Sequence[Teacher]) -> bool:
    return any(teacher.spec.library in SELF_SUPERVISED for teacher in teachers)


def _templates(
    settings: GenerateSettings,
    form: Form | None,
    teachers: Sequence[Teacher],
    basis: Basis | None,
    source: str,
) -> list[_Template]:
    templates = []
    if form is not None:
        classes = _classes(teachers)
        labels.check_form(form, classes)
        if form.kind == "logits" and len(teachers) > 1:
            raise UsageError(
                "form logits stores one teacher's scores; several teachers are averaged as "
                "probabilities: use full or topk:K, or generate one source per teacher."
            )
        if form.kind != "logits" and _self_supervised(teachers):
            raise UsageError(
                f"{teachers[0].spec} gives scores, not class probabilities: use --form logits and "
                "choose the temperature at training time."
            )
        recorded = LabelSettings(
            form,
            classes,
            crops=0,
            temperature=settings.temperature,
            precision=teachers[0].precision,
            teachers=tuple(teacher.facts() for teacher in teachers),
        )
        fields = schema.label_fields(form, classes)
        templates.append(_Template(f"labels/{source}", recorded, fields))
    return [
        *templates,
        *(_feature_part(text, settings, teachers, basis, source) for text in settings.features),
    ]


def _feature_part(
    text: str,
    settings: GenerateSettings,
    teachers: Sequence[Teacher],
    basis: Basis | None,
    source: str,
) -> _Template:
    layer, dims = features.parse_features(text)
    if len(teachers) > 1:
        raise UsageError("features are of a single teacher; generate one source per teacher.")
    (teacher,) = teachers
    if dims is not None:
        assert basis is not None  # the settings refuse components without a basis
        basis.check_teacher(teacher.facts())
        if basis.facts["tap"] != layer:
            raise UsageError(
                f"features {text}: the basis was fitted on {basis.facts['tap']} features."
            )
        basis.check_components(dims)
    shape = _map_shape(teacher) if layer == "map" else None
    width = shape[0] if shape else feature_layers.width(teacher.module.network)
    recorded = FeatureSettings(
        layer,
        dims=math.prod(shape) if shape else dims or width,
        width=width,
        code=settings.features_code,
        crops=0,
        basis=basis.digest if dims is not None and basis is not None else None,
        pre_is_post=not shape and not feature_layers.has_activation(teacher.module.network),
        shape=shape,
        precision=teacher.precision,
        teachers=(teacher.facts(),),
    )
    fields = stored_features.fields(recorded.dims, recorded.code)
    return _Template(f"features/{source}/{layer}", recorded, fields)


def _map_shape(teacher: Teacher) -> tuple[int, ...]:
    """(C, H, W) of the teacher's last feature map at its own input size."""
    device = next(teacher.module.parameters()).device
    final = feature_layers.example(teacher.module, teacher.preprocessing.size, device).final
    assert final is not None  # requested in the settings
    return tuple(int(n) for n in final.shape[1:])


def _classes(teachers: Sequence[Teacher]) -> int:
    widths = {t.classes if t.columns is None else len(t.columns) for t in teachers}
    if len(widths) > 1:
        raise UsageError(f"the teachers have different numbers of classes: {sorted(widths)}.")
    return widths.pop()


def _open_or_create(
    location: Location,
    data: Path,
    settings: GenerateSettings,
    drawing: Drawing,
    fields: list[Field],
    rank: Rank,
    folder: images.ImageFolder | None,
    reporter: Reporter,
) -> Store:
    store = begin.find_store(location)
    if store is None and not rank.main:
        log.info("waiting for part 1 to list the images")
        while (store := begin.find_store(location)) is None:
            time.sleep(1)
    if store is not None:
        return store
    crops_M = existing.crops_per_image(None, settings)
    if folder is None:
        with reporter.task("scan", 0, "files") as advance:
            folder = images.scan(data, need_classes=False, on_image=advance)
    _log_remarks(folder)
    crop_fields = schema.crop_fields(jitter=drawing.distribution.jitter is not None)
    per_image = schema.bytes_per_image([*fields, *crop_fields], crops_M)
    return writer.create_store(
        location,
        image_columns(folder),
        seed=drawing.seed,
        unit=schema.unit_images(per_image),
    )


def _log_remarks(folder: images.ImageFolder) -> None:
    if not folder.class_names:
        log.info("no class folders: treating the images as unlabelled")
    for remark in images.remarks(folder):
        log.warning("%s", remark)


def image_columns(folder: images.ImageFolder) -> writer.ImageColumns:
    """A scanned folder as a store holds it."""
    return writer.ImageColumns(
        keys=folder.keys,
        class_N=folder.class_N,
        size_N2=folder.size_N2,
        bytes_N=folder.bytes_N,
        class_names=folder.class_names,
        rejected=[(r.key, r.reason, r.detail) for r in folder.rejected],
        fingerprint=folder.fingerprint,
    )


def _rounds(
    store: Store, settings: GenerateSettings, drawing: Drawing
) -> list[Part[CropsSettings]]:
    """The existing rounds, and a new one if more crops are requested."""
    known = store.rounds()
    have = sum(part.settings.crops for part in known)
    requested = have if settings.crops is None else settings.crops
    if requested < have:
        raise StoreMismatchError(
            f"{store.url} has {have} crops per image, more than the requested {requested}. Leave "
            "--crops out to keep them; `fkdpipe thin` makes a store with fewer.",
            code="settings",
        )
    for part in known:
        if requested == have and part.settings.imported:
            continue  # imported boxes are stored, and nothing is drawn
        existing.check_drawing(store, part, drawing)
    if requested > have:
        known.append(
            writer.add_crops(
                store,
                drawing.distribution,
                seed=drawing.seed,
                count=requested - have,
                derived=drawing.derived,
            )
        )
    return known


def _backend(
    store: Store, source: str, choice: BackendChoice, device: torch.device, root: Path
) -> Backend:
    """The backend that a source was started with, or the one chosen for a new source."""
    ours = (part.settings for part in store.parts.values() if part.source == source)
    recorded = [settings.replay for settings in ours if settings.replay]  # unknown for imports
    if recorded and choice == "auto":
        return recorded[0]
    return replay.choose_backend(choice, device, _sample(store, root))


def _sample(store: Store, root: Path) -> Request:
    """A few crops of the first images, for the backend's self-check."""
    listed = store.images
    count = min(8, len(listed))
    boxes = [[[0, 0, h, w], [0, 0, max(1, h // 2), w]] for h, w in listed.size_N2[:count].tolist()]
    some = Crops(np.array(boxes, dtype=np.uint16), np.zeros((count, 2), dtype=bool))
    return Request.of(root, listed.keys[:count], listed.size_N2[:count], some)
