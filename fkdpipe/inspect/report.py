"""Size of a store on disk by field, and its projected size for ImageNet-1K.

All files of the store are counted: arrays, lists, commit records, manifests. Each field also has
its uncompressed size and the size with an ideal code (`entropy`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from fkdpipe.common.errors import DamagedStoreError, StoreError
from fkdpipe.inspect import entropy
from fkdpipe.storage import labels, schema, sizes
from fkdpipe.storage import plan as planning
from fkdpipe.storage.labels import parse_form
from fkdpipe.storage.store import Part, Store

IMAGENET_IMAGES = 1_281_167
IMAGENET_CROPS = 200

# Table 2 of the FKD paper: ImageNet-1K, 200 crops per image, bytes on disk.
PAPER_TABLE_2 = {
    "full": 0.9e12,
    "hard": 5.3e9,
    "smoothing": 6.2e9,
    "marginal-renorm:5": 13.3e9,
    "marginal-smoothing:5": 13.3e9,
    "marginal-smoothing:10": 22.2e9,
}


# Rows of the table without crops: ReLabel's maps, one per image.
PAPER_MAPS = {"ReLabel, whole map": 1e12, "ReLabel, top-5 map": 10e9}


@dataclass(frozen=True)
class FieldSize:
    """Bytes of one array over all rounds.

    Attributes:
        raw_bytes: before compression.
        bound: bytes per crop with an ideal code (`entropy`); None if unknown.
    """

    stored_bytes: int
    raw_bytes: int
    bytes_per_crop: float
    bound: float | None = None

    @property
    def ratio(self) -> float:
        """Compression ratio: raw over stored bytes."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 0.0


@dataclass(frozen=True)
class SourceReport:
    """One source of labels or features.

    Attributes:
        name: the source for labels, "SOURCE/LAYER" for features.
        kind: "labels" or "features". form: of labels, else "".
        targets: training targets it can serve. teachers: their names; "" if unknown.
        units_done, units: finished and total units, over all rounds.
    """

    name: str
    kind: str
    form: str
    targets: tuple[str, ...]
    teachers: tuple[str, ...]
    units_done: int
    units: int


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's Table 2, in bytes for ImageNet-1K x 200 crops.

    Attributes:
        this: this store at that scale; None if it does not serve the row's label.
        planned: a store with only that label; None for rows without crops.
    """

    name: str
    paper: float
    this: int | None
    planned: int | None


@dataclass(frozen=True)
class StorageReport:
    """Storage report of a store.

    Attributes:
        fields: by name; "images" and "commits" do not scale with the crops.
        imagenet: projected bytes for 1,281,167 images x 200 crops.
        paper: rows of the paper's Table 2 that this store serves, in bytes.
        table: all rows of Table 2.
        failed: images without labels in some source. rejected: files rejected by the scan.
    """

    url: str
    images: int
    crops_per_image: int
    classes: int
    form: str
    targets: tuple[str, ...]
    stored_bytes: int
    bytes_per_crop: float
    fields: dict[str, FieldSize]
    imagenet: int
    paper: dict[str, float]
    table: tuple[PaperRow, ...]
    sources: tuple[SourceReport, ...]
    failed: int
    rejected: int

    @property
    def finished(self) -> bool:
        """Whether all units are done, so that sizes per crop are meaningful."""
        return bool(self.sources) and all(s.units_done == s.units for s in self.sources)

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "crops_per_image": self.crops_per_image,
            "classes": self.classes,
            "form": self.form,
            "targets": list(self.targets),
            "stored_bytes": self.stored_bytes,
            "bytes_per_crop": self.bytes_per_crop,
            "fields": {
                name: {
                    "stored_bytes": size.stored_bytes,
                    "raw_bytes": size.raw_bytes,
                    "bytes_per_crop": size.bytes_per_crop,
                    "entropy_bytes_per_crop": size.bound,
                }
                for name, size in self.fields.items()
            },
            "imagenet": self.imagenet,
            "paper": self.paper,
            "table_2": [asdict(row) for row in self.table],
            "sources": [
                {"name": s.name, "kind": s.kind, "form": s.form, "units": s.units,
                 "units_done": s.units_done}
                for s in self.sources
            ],
            "failed": self.failed,
            "rejected": self.rejected,
        }  # fmt: skip


def measure(store: Store, *, bounds: bool = False) -> StorageReport:
    """Measure a store, finished or not.

    Args:
        bounds: also read a sample of the values to compute the size with an ideal code.

    Raises:
        StoreError: not a store, or its metadata (with `bounds`, its first units) is damaged.
    """
    names = sizes.field_names(store)
    stored = sizes.stored_bytes(store, names)
    rounds = store.rounds()
    crops_M = sum(part.settings.crops for part in rounds)
    crops = max(store.num_images * crops_M, 1)
    raw = _raw_bytes(store, names)
    ideal = _bounds(store, names) if bounds else {}
    fields = {
        name: FieldSize(stored[name], raw.get(name, 0), stored[name] / crops, ideal.get(name))
        for name in sorted(stored)
    }
    per_image = ("images", "commits")
    per_crop = sum(size.bytes_per_crop for n, size in fields.items() if n not in per_image)
    others = sum(stored[name] for name in per_image) / max(store.num_images, 1)
    imagenet = IMAGENET_IMAGES * (IMAGENET_CROPS * per_crop + others)
    all_sources = sources(store)
    first = next((s for s in all_sources if s.kind == "labels"), None)
    classes = max(
        (p.settings.classes for p in store.parts.values() if p.kind == "labels"), default=0
    )
    return StorageReport(
        url=store.url,
        images=store.num_images,
        crops_per_image=crops_M,
        classes=classes,
        form=first.form if first else "",
        targets=first.targets if first else (),
        stored_bytes=stored.total(),
        bytes_per_crop=stored.total() / crops,
        fields=fields,
        imagenet=round(imagenet),
        paper=_paper_rows(first.form, classes) if first else {},
        table=paper_table(first.form if first else "", classes, round(imagenet)),
        sources=all_sources,
        failed=len(_failed(store)),
        rejected=len(store.images.rejected),
    )


def _raw_bytes(store: Store, names: dict[str, str]) -> Counter[str]:
    """Uncompressed bytes of the committed units of each field."""
    raw: Counter[str] = Counter()
    for part in store.parts.values():
        if part.kind == "images":
            continue
        images = sum(
            store.unit_rows(unit).stop - store.unit_rows(unit).start
            for unit, marker in store.markers(part)
            if marker is not None
        )
        for field in part.fields:
            size = schema.bytes_per_image([field], part.settings.crops)
            raw[names[f"{part.path}/{field.name}"]] += images * size
    return raw


def _bounds(store: Store, names: dict[str, str]) -> dict[str, float]:
    """Bounds by reported name, from the first round that has one: rounds are independent."""
    bounds: dict[str, float] = {}
    for part in store.parts.values():
        if part.kind == "images" or all(
            names[f"{part.path}/{f.name}"] in bounds for f in part.fields
        ):
            continue
        for field, size in entropy.bytes_per_crop(store, part).items():
            if size is not None:
                bounds.setdefault(names[f"{part.path}/{field}"], size)
    return bounds


def sources(store: Store) -> tuple[SourceReport, ...]:
    """Labels and features of a store, by kind and name."""
    parts_by_name: dict[tuple[str, str], list[Part]] = {}
    for part in store.parts.values():
        if part.kind in ("labels", "features"):
            name = "/".join(filter(None, (part.source, part.layer)))
            parts_by_name.setdefault((part.kind, name), []).append(part)
    reports = []
    for (kind, name), parts in sorted(parts_by_name.items()):
        form = parts[0].settings.form if kind == "labels" else None
        reports.append(
            SourceReport(
                name=name,
                kind=kind,
                form=str(form or ""),
                targets=tuple(labels.served_targets(form)) if form else (),
                teachers=tuple(str(t["name"] or "") for t in parts[0].settings.teachers),
                units_done=sum(_units_done(store, part) for part in parts),
                units=store.num_units * len(parts),
            )
        )
    return tuple(reports)


def _units_done(store: Store, part: Part) -> int:
    try:
        if store.manifest(part) is not None:
            return store.num_units
    except DamagedStoreError:  # `verify` reports it; commit records still give the progress
        pass
    return sum(marker is not None for _, marker in store.markers(part))


def _failed(store: Store) -> set[int]:
    return {
        row
        for part in store.parts.values()
        for _, marker in store.markers(part)
        if marker is not None
        for row in marker.failed
    }


def _paper_rows(form_text: str, classes: int) -> dict[str, float]:
    """Rows of Table 2 whose label this form can serve."""
    form = parse_form(form_text)
    rows = {}
    for name, size in PAPER_TABLE_2.items():
        target = labels.parse_target(name)
        try:
            labels.check_target(form, target, max(classes, target.k))
        except StoreError:
            continue
        rows[name] = size
    return rows


def paper_table(form_text: str, classes: int, imagenet: int) -> tuple[PaperRow, ...]:
    """Table 2 with a store of this form, of `imagenet` bytes at the paper's scale."""
    served = _paper_rows(form_text, classes) if form_text else {}
    rows = [PaperRow(name, size, None, None) for name, size in PAPER_MAPS.items()]
    for name, size in PAPER_TABLE_2.items():
        form = planning.paper_form(labels.parse_target(name))
        spec = planning.Wanted(IMAGENET_IMAGES, IMAGENET_CROPS, 1000, (form,))
        (planned,) = planning.plan(spec).stores
        this = imagenet if name in served else None
        rows.append(PaperRow(name, size, this, planned.stored_bytes))
    return tuple(rows)
