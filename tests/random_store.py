"""A small store of random labels, made without images or a teacher."""

from __future__ import annotations

import numpy as np

from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import labels, rounds, schema, writer
from fkdpipe.storage.location import LocalLocation
from fkdpipe.storage.settings import LabelSettings
from fkdpipe.storage.store import Store

IMAGES, CROPS, CLASSES, UNIT, GROUP = 150, 10, 40, 64, 4


def make_store(place, *, form="topk:5", seal=True, derived=False, flip=0.5, seed=0) -> Store:
    """A store of random labels, three units, the last one short."""
    random = np.random.default_rng(seed)
    location = LocalLocation(place)
    store = writer.create_store(
        location,
        writer.ImageColumns(
            keys=[f"c{k % 7}/{k}.jpg" for k in range(IMAGES)],
            class_N=np.arange(IMAGES, dtype=np.int32) % 7,
            size_N2=random.integers(50, 400, (IMAGES, 2)).astype(np.uint16),
            bytes_N=random.integers(1000, 9000, IMAGES),
            class_names=[f"c{k}" for k in range(7)],
            rejected=[("c1/bad.png", "16-bit", "16-bit PNG")],
            fingerprint="f" * 64,
        ),
        seed=3,
        unit=UNIT,
        group=GROUP,
    )
    part = writer.add_crops(
        store, CropDistribution(flip=flip), seed=3, count=CROPS, derived=derived
    )
    settings = LabelSettings(labels.parse_form(form), CLASSES, CROPS)
    fields = schema.label_fields(settings.form, CLASSES)
    taught = writer.add_part(store, "rounds/0/labels/t", settings, fields)
    for unit in range(store.num_units if seal else store.num_units - 1):
        fill(store, part, taught, unit, random)
    for each in (part, taught):
        assert writer.seal(store, each) is seal
    return store


def fill(store, part, taught, unit, random) -> None:
    drawn = rounds.draw(store, part, unit)
    values = {"box": drawn.box_NM4, "flip": drawn.flip_NM} if part.fields else {}
    made = {"crops_crc32c": rounds.checksum(drawn)}
    writer.commit_unit(store, part, unit, values, facts=made)
    writer.commit_unit(store, taught, unit, random_labels(store, taught, unit, random))


def random_labels(store, taught, unit, random) -> dict[str, np.ndarray]:
    rows = store.unit_rows(unit)
    shape = (rows.stop - rows.start, CROPS)
    form = taught.settings.form
    z = random.normal(size=(*shape, CLASSES)).astype(np.float32) * 2
    prob = labels.softmax(z.reshape(-1, CLASSES))
    if not form.sparse:
        scores = labels.encode_scores(np.log(prob)).reshape(*shape, CLASSES)
        largest = {"logit_max": np.zeros(shape, np.float32)} if form.kind == "logits" else {}
        return {form.value_field: scores, **largest}
    ids, kept = labels.hybrid_order(*labels.top_k(prob, form.k))
    values = {"ids": ids.reshape(*shape, -1).astype(np.uint16)}
    if form.kind == "topk":
        values[form.value_field] = labels.encode_probabilities(form, kept).reshape(*shape, -1)
    return values


def flip_bit(file, offset: int = 40) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 4
    file.write_bytes(bytes(data))
