"""Predictions of models on the recorded crops, to compare them with the labels.

Letters: I images, m crops of each, C classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fkdpipe.common.errors import ModelError, ReplayError
from fkdpipe.inspect.analysis import Predict
from fkdpipe.inspect.sources import Opened
from fkdpipe.networks.teachers import Teacher
from fkdpipe.pixels import colour
from fkdpipe.pixels.replay import Replay, Request, normalise


def request(opened: Opened, root: Path, rows_I: np.ndarray, crops_m: np.ndarray) -> Request:
    """A replay request for the recorded crops of some images.

    Args:
        root: folder of the split that the store was made from.
    """
    listed, boxes = opened.store.images, opened.boxes.take(rows_I, crops_m)
    return Request.of(root, listed.keys[rows_I], listed.size_N2[rows_I], boxes)


def factors(opened: Opened, rows_I: np.ndarray, crops_m: np.ndarray) -> torch.Tensor | None:
    """float32 (I * m, 4): recorded colour jitter of the crops; None if the store has none."""
    jitter_NM4 = opened.boxes.take(rows_I, crops_m).jitter_NM4
    return None if jitter_NM4 is None else torch.from_numpy(jitter_NM4.reshape(-1, 4))


def predictor(
    opened: Opened, root: Path, model: Teacher, replayer: Replay, *, batch: int = 64
) -> Predict:
    """The prediction function of a model, for `analysis.analyse`.

    Args:
        replayer: with one view, the model's.
        batch: crops per forward pass.

    Raises:
        ModelError: the model's outputs do not match the labels' classes.
    """
    width = model.classes if model.columns is None else len(model.columns)
    if width != opened.classes:
        raise ModelError(
            f"{model.spec} has {width} outputs, but the labels have {opened.classes} classes; map "
            "outputs to classes with --class-map.",
            code="classes-differ",
        )
    device = next(model.module.parameters()).device
    p = model.preprocessing

    def predict(rows_I: np.ndarray, crops_m: np.ndarray) -> np.ndarray:
        step = max(batch // len(crops_m), 1)
        parts = [rows_I[first : first + step] for first in range(0, len(rows_I), step)]
        probabilities = []
        for part, pixels in zip(
            parts,
            replayer.run(request(opened, root, rows, crops_m) for rows in parts),
            strict=True,
        ):
            for failure in pixels.failures:
                key = opened.store.images.keys[part[failure.image]]
                raise ReplayError(f"{key}: {failure.detail}.", code=failure.code)
            jittered = colour.jitter(pixels.views[0].to(device), factors(opened, part, crops_m))
            x = normalise(jittered, p.mean, p.std)
            logits_BC = model.logits(x.contiguous(memory_format=torch.channels_last))
            probabilities.append(torch.softmax(logits_BC, dim=1).cpu().numpy())
        return np.concatenate(probabilities).reshape(len(rows_I), len(crops_m), -1)

    return predict
