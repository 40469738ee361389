"""Losses as pure functions: one value per sample, unless the paper couples the batch.

Letters: B batch, C classes.
"""

from __future__ import annotations

import torch


def soft_cross_entropy(logits_BC: torch.Tensor, target_BC: torch.Tensor) -> torch.Tensor:
    """float32 (B,): -sum_c target_c log softmax(logits)_c, in nats.

    Classes with zero target contribute zero, even if their logit is -inf.

    Args:
        logits_BC: student scores before softmax. target_BC: probabilities, rows sum to 1.

    Reference:
        Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition",
        section 3.1, L = -sum_i P_i log S(R_i).
    """
    log_prob_BC = torch.log_softmax(logits_BC.float(), dim=1)
    return -torch.where(target_BC > 0, target_BC * log_prob_BC, 0.0).sum(dim=1)


def kl_divergence(logits_BC: torch.Tensor, target_BC: torch.Tensor) -> torch.Tensor:
    """float32 (B,): sum_c target_c (log target_c - log softmax(logits)_c), in nats.

    The cross-entropy minus the target's entropy: same gradient, and zero at the optimum.
    """
    entropy_B = -torch.special.xlogy(target_BC, target_BC).sum(dim=1)
    return soft_cross_entropy(logits_BC, target_BC) - entropy_B
