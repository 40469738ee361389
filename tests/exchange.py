"""Labels into a store and out of it, and whether what came out is what went in."""

from __future__ import annotations

from pathlib import Path

import foreign
import numpy as np

from fkdpipe.interchange import EXPORTS, choose, importing, open_labels
from fkdpipe.interchange.exporting import Export, ExportSettings
from fkdpipe.interchange.source import ImportSettings
from fkdpipe.storage import verify
from fkdpipe.storage.location import open_location
from fkdpipe.storage.store import open_store


def bring(format_: str, place: Path, data: Path, store: Path, **settings) -> importing.Imported:
    """`fkdpipe import` with its checks: the store is complete and sound."""
    wanted = ImportSettings(**{"threads": 2, **settings})
    folder = importing.scan(data)
    labels = open_labels(format_, place, folder, wanted)
    made = importing.import_labels(labels, folder, open_location(store), wanted)
    assert verify.verify(open_store(store), full=True) == []
    return made


def send(format_: str, store, out: Path, **settings):
    return choose(EXPORTS, format_)(store, out, ExportSettings(**settings))


def content(store, **settings) -> foreign.Truth:
    """What a store holds, as `foreign.make_truth` describes it."""
    export = Export(store, ExportSettings(**settings))
    truth = {}
    for unit in export.units():
        for i, key in enumerate(unit.keys):
            truth[key] = {
                "box": unit.box_IM4[i].astype(int),
                "flip": unit.flip_IM[i],
                "ids": unit.ids_IMK[i],
                "prob": unit.prob_IMK[i],
                "size": unit.size_I2[i].astype(int),
            }
    return truth


def agree(found: foreign.Truth, expected: foreign.Truth, *, k=None, tolerance=2.0**-11) -> None:
    """Boxes, flips and classes equal; probabilities within the precision of float16."""
    assert found.keys() == expected.keys()
    for key, entry in expected.items():
        np.testing.assert_array_equal(found[key]["box"], entry["box"], err_msg=key)
        np.testing.assert_array_equal(found[key]["flip"], entry["flip"], err_msg=key)
        a, b = (dict(zip_rows(e, k)) for e in (found[key], entry))
        for crop in b:
            assert a[crop].keys() == b[crop].keys(), key
            for c, p in b[crop].items():
                assert abs(a[crop][c] - p) <= tolerance * p + 2.0**-24, key


def zip_rows(entry: dict, k: int | None):
    """crop -> {class: probability}; the order within a label says nothing more."""
    for crop, (ids, prob) in enumerate(zip(entry["ids"], entry["prob"], strict=True)):
        yield crop, dict(zip(ids[:k].tolist(), prob[:k].tolist(), strict=True))
