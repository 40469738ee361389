"""Every format that comes in goes out in every format, and says the same when it is read again."""

from __future__ import annotations

from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from exchange import agree, bring, content, send

from fkdpipe.common.errors import LabelsError
from fkdpipe.interchange import EXPORTS, IMPORTS
from fkdpipe.pixels import images

CROPS, K, CLASSES = 3, 3, 1000
SETTINGS = {
    "fkd": {"classes": CLASSES},
    "ml-dr": {},
    "tinyvit": {"classes": CLASSES, "assume_plain": True},
    "relabel": {"classes": CLASSES, "crops": CROPS, "keep": K},
    "tokenlabeling": {"classes": CLASSES, "crops": CROPS, "keep": K},
    "sre2l": {},
}


def write(format_: str, place: Path, data: Path) -> foreign.Truth | None:
    """Files of a format, and what they say; None where crops are drawn when they are read."""
    scanned = images.scan(data)
    order = foreign.imagefolder_keys(data / "train")
    truth = foreign.make_truth(scanned, crops=CROPS, k=K, classes=CLASSES, half=True)
    if format_ == "fkd":
        foreign.write_fkd(place, truth)
    elif format_ == "ml-dr":
        foreign.write_mldr(place, truth, order)
    elif format_ == "tinyvit":
        foreign.write_tinyvit(place, truth, order)
    elif format_ == "sre2l":
        for entry in truth.values():
            entry["logits"] = np.random.default_rng(0).normal(0, 4, (CROPS, 7)).astype(np.float32)
            prob = torch.softmax(torch.from_numpy(entry["logits"]), 1).topk(K)
            entry["ids"], entry["prob"] = prob.indices.numpy(), prob.values.numpy()
        foreign.write_sre2l(place, truth, order, batch=6)
    else:
        dtype = torch.float32 if format_ == "relabel" else torch.float16
        maps = foreign.make_maps(scanned, cells=(4, 5), k=5, classes=CLASSES, dtype=dtype)
        for key, values in maps.items():
            path = place / f"{key.rsplit('.', 1)[0]}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(values, path)
        return None
    return truth


def read_table(file: Path) -> foreign.Truth:
    """A Parquet table as `foreign.make_truth` describes labels."""
    import pyarrow.parquet as pq

    rows: dict[str, list[dict]] = {}
    for row in pq.read_table(file).to_pylist():
        rows.setdefault(row["key"], []).append(row)
    sides = ("top", "left", "height", "width")
    return {
        key: {
            "box": np.array([[row[side] for side in sides] for row in crops]),
            "flip": np.array([row["flip"] for row in crops]),
            "ids": np.array([row["ids"] for row in crops]),
            "prob": np.array([row["prob"] for row in crops]),
        }
        for key, crops in rows.items()
    }


@pytest.mark.parametrize("goes", EXPORTS)
@pytest.mark.parametrize("comes", IMPORTS)
def test_labels_of_every_format_survive_every_other(tmp_path, few, comes, goes):
    truth = write(comes, tmp_path / "files", few)
    store = bring(comes, tmp_path / "files", few, tmp_path / "store", **SETTINGS[comes]).store
    held = content(store, keep=K)
    if truth is not None:  # SRe2L's scores are kept as float16 distances from the largest
        agree(held, truth, tolerance=0.01 if comes == "sre2l" else 2.0**-11)
    if goes == "tinyvit" and comes != "tinyvit":
        with pytest.raises(LabelsError, match="seed"):
            send(goes, store, tmp_path / "out", keep=K)
        return
    send(goes, store, tmp_path / "out", keep=K)
    if goes == "parquet":
        again = read_table(tmp_path / "out" / "labels.parquet")
    else:
        back = bring(goes, tmp_path / "out", few, tmp_path / "back", **SETTINGS[goes])
        assert (back.form, back.crops, back.failed.total()) == (f"topk:{K}", CROPS, 0)
        again = content(back.store)
    agree(again, held)
