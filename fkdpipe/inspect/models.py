"""Predictions of models on the recorded crops, for distances between labels and models.

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
    """The recorded crops of some images, ready to replay.

    Args:
        root: of the split that the store was made from.
    """
    listed, recorded = opened.store.images, opened.boxes.take(rows_I, crops_m)
    return Request.of(root, listed.keys[rows_I], listed.size_N2[rows_I], recorded)


def factors(opened: Opened, rows_I: np.ndarray, crops_m: np.ndarray) -> torch.Tensor | None:
    """float32 (I * m, 4): recorded colour jitter of those crops, None where none is recorded."""
    recorded = opened.boxes.take(rows_I, crops_m).jitter_NM4
    return None if recorded is None else torch.from_numpy(recorded.reshape(-1, 4))


def predictor(
    opened: Opened, root: Path, model: Teacher, replayer: Replay, *, batch: int = 64
) -> Predict:
    """How `analysis.analyse` asks one model.

    Args:
        replayer: with one view, the model's.
        batch: crops per forward pass.

    Raises:
        ModelError: its outputs are not the labels' classes.
    """
    width = model.classes if model.columns is None else len(model.columns)
    if width != opened.classes:
        raise ModelError(
            f"{model.spec} gives {width} outputs, the labels have {opened.classes} classes; say "
            "which output is which class with --class-map.",
            code="classes-differ",
        )
    device = next(model.module.parameters()).device
    p = model.preprocessing

    def predict(rows_I: np.ndarray, crops_m: np.ndarray) -> np.ndarray:
        step = max(batch // len(crops_m), 1)
        parts = [rows_I[first : first + step] for first in range(0, len(rows_I), step)]
        made = []
        for part, pixels in zip(
            parts,
            replayer.run(request(opened, root, rows, crops_m) for rows in parts),
            strict=True,
        ):
            for failure in pixels.failures:
                key = opened.store.images.keys[part[failure.image]]
                raise ReplayError(f"{key}: {failure.detail}.", code=failure.code)
            seen = colour.jitter(pixels.views[0].to(device), factors(opened, part, crops_m))
            x = normalise(seen, p.mean, p.std)
            logits_BC = model.logits(x.contiguous(memory_format=torch.channels_last))
            made.append(torch.softmax(logits_BC, dim=1).cpu().numpy())
        return np.concatenate(made).reshape(len(rows_I), len(crops_m), -1)

    return predict
