"""From teachers' outputs on the device to the arrays that a store holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fkdpipe.networks import teachers as teachers_
from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.networks.features import Basis
from fkdpipe.networks.teachers import Teacher
from fkdpipe.pixels import colour
from fkdpipe.pixels.crops import Crops
from fkdpipe.pixels.replay import View, normalise
from fkdpipe.storage import features, labels
from fkdpipe.storage.labels import Form
from fkdpipe.storage.store import Part


def views_of(teachers: Sequence[Teacher]) -> list[View]:
    """The distinct views that the teachers need, in order of first use."""
    return list(dict.fromkeys(View.of(teacher.preprocessing) for teacher in teachers))


def factors(recorded: Crops, index_B: np.ndarray) -> torch.Tensor | None:
    """float32 (B, 4) colour factors of some crops; index = image * M + crop."""
    if recorded.jitter_NM4 is None:
        return None
    return torch.from_numpy(recorded.jitter_NM4.reshape(-1, 4)[index_B])


def teach(
    teachers: Sequence[Teacher],
    pixels: dict[View, torch.Tensor],
    factor_B4: torch.Tensor | None = None,
) -> list[Outputs]:
    """Each teacher's outputs for the uint8 pixels of its view, on the device.

    Args:
        factor_B4: recorded colour jitter of the crops (`fkdpipe.pixels.colour.jitter`).

    Raises:
        ModelError: a teacher gives values that are not finite.
    """
    pixels = {view: colour.jitter(seen, factor_B4) for view, seen in pixels.items()}
    results = []
    for teacher in teachers:
        p = teacher.preprocessing
        results.append(teacher.outputs(normalise(pixels[View.of(p)], p.mean, p.std)))
    _refuse_infinite(teachers, results)
    return results


def _refuse_infinite(teachers: Sequence[Teacher], results: Sequence[Outputs]) -> None:
    """Refuse NaN and infinity: one NaN in a weight or one overflow spoils every label of a crop."""
    tensors = [(o.logits, o.pre, o.penultimate, o.final) for o in results]
    values = [[v for v in some if v is not None] for some in tensors]
    finite = torch.stack([torch.stack([v.isfinite().all() for v in some]).all() for some in values])
    for teacher, good in zip(teachers, finite.tolist(), strict=True):  # waits for the device once
        if not good:
            raise teachers_.not_finite(str(teacher.spec), teacher.precision)


def encode_part(
    part: Part, outputs: Sequence[Outputs], teachers: Sequence[Teacher], basis: Basis | None
) -> dict[str, np.ndarray]:
    """The stored fields of a part for B crops."""
    if part.kind == "labels":
        return encode_labels(
            part.settings.form,
            [output.logits for output in outputs],
            [teacher.weight for teacher in teachers],
            part.settings.temperature,
        )
    (output,) = outputs  # the plan refuses features of an ensemble, which have no meaning
    layers = {"pre": output.pre, "post": output.penultimate, "map": output.final}
    values = layers[part.layer]
    assert values is not None
    vectors_BD = values.flatten(1)  # a map is stored in the order C, H, W
    if part.settings.basis is not None:  # a store may hold raw vectors beside projected ones
        assert basis is not None
        vectors_BD = basis.project(vectors_BD, part.settings.dims)
    return features.encode(part.settings.code, vectors_BD.float().cpu().numpy())


def encode_labels(
    form: Form, logits: Sequence[torch.Tensor], shares: Sequence[float], temperature: float
) -> dict[str, np.ndarray]:
    """The stored fields of B labels.

    Args:
        logits: float32 (B, C) of each teacher.
        shares: of the teachers in the ensemble, summing to 1.
    """
    if form.kind == "logits":
        (z_BC,) = logits  # ensembles average probabilities; the plan refuses several logits
        top_B = z_BC.max(dim=1).values
        scores = labels.encode_scores((z_BC - top_B[:, None]).cpu().numpy())
        return {form.value_field: scores, "logit_max": top_B.cpu().numpy()}
    log_prob_BC = teachers_.average(logits, shares, temperature)
    if form.kind == "full":
        return {form.value_field: labels.encode_scores(log_prob_BC.cpu().numpy())}
    top = log_prob_BC.topk(form.k, dim=1)
    ids_BK = top.indices.cpu().numpy()
    dtype = labels.id_dtype(log_prob_BC.shape[1])
    if form.kind == "hard":
        return {"ids": ids_BK.astype(dtype)}
    ids_BK, prob_BK = labels.hybrid_order(ids_BK, top.values.exp().cpu().numpy())
    stored_BK = labels.encode_probabilities(form, prob_BK)
    return {"ids": ids_BK.astype(dtype), form.value_field: stored_BK}


def first_choices(form: Form, encoded: dict[str, np.ndarray]) -> np.ndarray:
    """The class with the highest probability, (B,), from the stored fields of B labels."""
    return encoded["ids"][:, 0] if form.sparse else encoded[form.value_field].argmax(axis=1)
