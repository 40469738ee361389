"""A store made from another system's labels trains, and takes more labels, like any store."""

from __future__ import annotations

import foreign
import numpy as np
import pipeline
import pytest
import torch
from exchange import bring

from fkdpipe.common.errors import StoreMismatchError
from fkdpipe.interchange.exporting import Export, ExportSettings
from fkdpipe.pixels import images
from fkdpipe.storage import verify

M = 4


def fkd_pixels(path: bytes, fraction: np.ndarray, flip: bool) -> torch.Tensor:
    """FKD's loader: fractions of the decoded image to a crop, resized and flipped.

    Its Pillow resize is replaced by the kernel of our cpu replay (torch's antialias resize), so
    that losses can be compared to the last bit that matters.
    """
    from PIL import Image
    from torchvision.transforms.v2 import functional

    with Image.open(path) as image:
        whole = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
    H, W = whole.shape[1:]
    top, left, h, w = np.rint(fraction.astype(float) * [H, W, H, W]).astype(int).tolist()
    crop = whole[:, top : top + h, left : left + w]
    resized = functional.resize(crop, [32, 32], antialias=True)
    return resized.flip(-1) if flip else resized


@pytest.mark.parametrize(
    ("kind", "target"),
    [("marginal_smoothing", "marginal-smoothing:3"), ("marginal_renorm", "marginal-renorm:3")],
)
def test_an_import_trains_to_the_loss_of_the_files_themselves(tmp_path, folder, kind, target):
    """One fixed student over the same crops: our feed, and FKD's loader and label rule."""
    from fkdpipe.pixels.replay import normalise
    from fkdpipe.train.losses import soft_cross_entropy

    scanned = images.scan(folder)
    truth = foreign.make_truth(scanned, crops=M, k=3, classes=5)
    place = tmp_path / "labels"
    for key, entry in truth.items():
        (place / key).parent.mkdir(parents=True, exist_ok=True)
        state = [torch.from_numpy(a) for a in foreign.fkd_state(entry, label="marginal")]
        torch.save(state, place / f"{key}.tar")
    store = bring("fkd", place, folder, tmp_path / "store").store
    settings = pipeline.train_settings(target=target, crops_per_image=M, batch_size=4 * M, epochs=M)
    run = pipeline.prepare_run(tmp_path / "run", folder, store, settings)
    student = run.student.module.eval()
    ours, theirs = [], []
    with torch.no_grad():
        for batch in run.crops.stream():
            mean, std = run.student.preprocessing.mean, run.student.preprocessing.std
            ours += soft_cross_entropy(student(batch.pixels), batch.labels).tolist()
            pixels, labels = [], []
            for row, crop in zip(batch.rows.tolist(), batch.crops.tolist(), strict=True):
                key = str(run.feed.data.keys[row])
                fraction, flip, label = torch.load(place / f"{key}.tar", weights_only=True)
                path = images.path_of(scanned.root, key)
                pixels.append(fkd_pixels(path, fraction[crop].numpy(), bool(flip[crop])))
                labels.append(foreign.fkd_dense(label[crop].numpy(), kind, 5))
            logits = student(normalise(torch.stack(pixels), mean, std))
            soft = torch.from_numpy(np.stack(labels))
            theirs += (-(soft * torch.log_softmax(logits.double(), 1)).sum(1)).tolist()
    assert len(ours) == len(truth) * M
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)  # float16 probabilities
    assert abs(np.mean(ours) - np.mean(theirs)) < 2e-4


def test_an_import_trains_and_serves_targets_like_any_store(tmp_path, few):
    truth = foreign.make_truth(images.scan(few), crops=2, k=3, classes=3)
    place = foreign.write_fkd(tmp_path / "labels", truth)
    (place / "train" / "a" / "i0.tar").unlink()
    store = bring("fkd", place, few, tmp_path / "store").store
    done = pipeline.train(tmp_path / "run", few, store, batch_size=8, epochs=2)
    assert done.steps > 0
    with pytest.raises(StoreMismatchError, match="temperature is unknown"):
        pipeline.train(tmp_path / "r2", few, store, batch_size=8, label_temperature=2.0)


def test_another_teacher_labels_imported_crops(tmp_path, folder, teacher):
    """The boxes of an import are as good as ours: `generate` adds labels of its own to them."""
    truth = foreign.make_truth(images.scan(folder), crops=2, k=3, classes=5)
    place = tmp_path / "labels"
    for key, entry in truth.items():
        (place / key).parent.mkdir(parents=True, exist_ok=True)
        if key != "ash/0.jpg":
            torch.save(foreign.fkd_state(entry, label="marginal"), place / f"{key}.tar")
    bring("fkd", place, folder, tmp_path / "store")
    store = pipeline.make_store(tmp_path / "store", folder, [teacher], crops=None, source="ours")
    assert verify.verify(store, full=True) == []
    export = Export(store, ExportSettings(source="ours"))
    keys = [key for unit in export.units() for key in unit.keys]
    assert sorted(keys) == sorted(set(truth) - {"ash/0.jpg"})
