"""Label maps become labels of crops, as RoIAlign pools them."""

from __future__ import annotations

import foreign
import numpy as np
import pipeline
import pytest
import torch
from exchange import bring, content

from fkdpipe.common.errors import LabelsError, UsageError
from fkdpipe.interchange import relabel
from fkdpipe.pixels import images
from fkdpipe.storage.store import open_store


@pytest.fixture
def truth(few):
    return foreign.make_truth(images.scan(few), crops=3, k=3, classes=1000, half=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype", "cells"),
    [("relabel", torch.float32, (15, 15)), ("tokenlabeling", torch.float16, (18, 18))],
)
def test_label_maps_are_pooled_as_roi_align_pools_them(
    tmp_path,
    few,
    name,
    dtype,
    cells,
    transposed,
):
    scanned = images.scan(few)
    maps = foreign.make_maps(scanned, cells=cells, k=5, classes=300, dtype=dtype)
    for key, values in maps.items():
        path = tmp_path / "maps" / f"{key.rsplit('.', 1)[0]}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(values, path)
    made = bring(
        name, tmp_path / "maps", few, tmp_path / "store", classes=300, crops=4, seed=3,
        compat_transposed=transposed,
    )  # fmt: skip
    assert made.form == "topk:5"
    found = content(made.store)
    assert found.keys() == maps.keys()
    differs = 0
    for key, entry in found.items():
        for crop in range(4):
            box, size = entry["box"][crop], entry["size"]
            dense = foreign.pool_maps(maps[key], box, size, 300, transposed=transposed)
            best = np.argsort(-dense, kind="stable")[:5]
            np.testing.assert_allclose(entry["prob"][crop], dense[best], rtol=2.0**-10)
            np.testing.assert_allclose(dense[entry["ids"][crop]], dense[best], rtol=2.0**-10)
            other = foreign.pool_maps(maps[key], box, size, 300, transposed=not transposed)
            differs += int(other.argmax() != dense.argmax())
    assert differs > 10  # the images are asymmetric: the two poolings are not the same


def test_pooling_agrees_on_odd_maps_boxes_and_few_classes():
    random = np.random.default_rng(0)
    for _ in range(60):
        H, W, classes = random.integers(1, 9), random.integers(1, 9), int(random.integers(3, 9))
        k, keep = int(random.integers(1, 4)), int(random.integers(1, classes + 1))
        ids = random.random((classes, H, W)).argsort(0)[:k]
        scores = random.normal(0, 2, (k, H, W))
        size = random.integers(5, 50, 2)
        h, w = (int(random.integers(1, n + 1)) for n in size)
        box = np.array([random.integers(size[0] - h + 1), random.integers(size[1] - w + 1), h, w])
        region = relabel._fractions(box[None], size, transposed=False)
        found, prob = relabel.pool(scores, ids, region, classes, keep)
        both = torch.from_numpy(np.stack([scores, ids]))
        dense = foreign.pool_maps(both, box, size, classes, transposed=False)
        np.testing.assert_allclose(prob[0], -np.sort(-dense)[:keep], rtol=1e-5)
        np.testing.assert_allclose(dense[found[0]], prob[0], rtol=1e-5)
        assert len(set(found[0].tolist())) == keep


def test_label_maps_need_crops_and_exact_ids(tmp_path, few, truth):
    maps = foreign.make_maps(images.scan(few), cells=(4, 4), k=3, classes=900, dtype=torch.float16)
    for key, values in maps.items():
        path = tmp_path / "maps" / f"{key.rsplit('.', 1)[0]}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(values, path)
    with pytest.raises(UsageError, match="--crops M"):
        bring("relabel", tmp_path / "maps", few, tmp_path / "s")
    with pytest.raises(LabelsError, match="2,048"):
        bring("relabel", tmp_path / "maps", few, tmp_path / "s", crops=2, classes=3000)
    with pytest.raises(LabelsError, match="--classes"):
        bring("relabel", tmp_path / "maps", few, tmp_path / "s", crops=2, keep=3)


def test_pooled_labels_join_a_store_of_the_same_crops(tmp_path, folder, teacher):
    """Label maps are pooled for our own crops, so they can stand beside a teacher's labels."""
    store = pipeline.make_store(tmp_path / "store", folder, [teacher], crops=3, seed=5)
    scanned = images.scan(folder)
    maps = foreign.make_maps(scanned, cells=(4, 4), k=3, classes=5, dtype=torch.float32)
    for key, values in maps.items():
        path = tmp_path / "maps" / f"{key}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(values, path)
    bring("relabel", tmp_path / "maps", folder, tmp_path / "store", crops=3, seed=5, keep=3)
    assert open_store(tmp_path / "store").sources() == ["relabel", "t"]
    assert len(store.rounds()) == 1
