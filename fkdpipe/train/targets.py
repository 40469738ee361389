"""Stored labels to dense probabilities, on the device. FKD equations 3 to 7."""

from __future__ import annotations

import torch

from fkdpipe.storage.labels import SparseLabels, Target
from fkdpipe.train.stored import LabelBatch, Scores


def dense(
    labels: LabelBatch | None,
    target: Target,
    classes: int,
    class_B: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """float32 (B, C) probabilities a student is trained on; rows sum to 1.

    Args:
        labels: None for ground truth, which is one-hot.
        class_B: int64, the folder's classes.
    """
    if labels is None:
        known_B = class_B.to(device)  # -1 in a folder without classes: nothing is true
        return (
            torch.nn.functional.one_hot(known_B.clamp_min(0), classes)
            * (known_B >= 0)[:, None].float()
        )
    if isinstance(labels, SparseLabels):
        ids_BK = torch.from_numpy(labels.ids_BK).to(device, non_blocking=True)
        prob_BK = torch.from_numpy(labels.prob_BK).to(device, non_blocking=True)
        rest_B = torch.from_numpy(labels.rest_B).to(device, non_blocking=True)
        return spread(ids_BK, prob_BK, rest_B, classes)
    return from_scores(labels, target, device)


def spread(
    ids_BK: torch.Tensor, prob_BK: torch.Tensor, rest_B: torch.Tensor, classes: int
) -> torch.Tensor:
    """StoredLayer probabilities at their classes, the rest shared evenly by the C - K others."""
    share_B = rest_B / max(classes - ids_BK.shape[1], 1)
    filled = share_B[:, None].expand(-1, classes).contiguous()
    return filled.scatter_(1, ids_BK, prob_BK)


def from_scores(scores: Scores, target: Target, device: torch.device) -> torch.Tensor:
    """Any target from stored log-probabilities or logits."""
    z_BC = torch.from_numpy(scores.scores_BC).to(device, non_blocking=True).float()
    prob_BC = torch.softmax(z_BC / scores.temperature, dim=1)
    if target.kind == "full":
        return prob_BC
    if target.kind == "hard":
        return torch.nn.functional.one_hot(prob_BC.argmax(1), prob_BC.shape[1]).float()
    k = 1 if target.kind == "smoothing" else target.k
    top = prob_BC.topk(k, dim=1)
    total_B1 = top.values.sum(dim=1, keepdim=True)
    if target.kind == "marginal-renorm" or k == prob_BC.shape[1]:
        kept, rest_B = top.values / total_B1, torch.zeros_like(total_B1[:, 0])
    else:
        kept, rest_B = top.values, (1 - total_B1[:, 0]).clamp_min(0)
    return spread(top.indices, kept, rest_B, prob_BC.shape[1])
