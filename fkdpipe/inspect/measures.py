"""Metrics of single labels: entropy, distances, and background crops.

Entropies, cross-entropies and divergences are in nats. Letters: B crops, C classes.
"""

from __future__ import annotations

import numpy as np

UNSURE = 0.5  # low confidence: a largest probability below this
ABSENT = 0.1  # background: low confidence, and the image's class has less than this
FLOOR = 2.0**-22  # about the rounding error of a float32 sum; smaller values count as zero


def entropy(prob_BC: np.ndarray) -> np.ndarray:
    """float64 (B,), in nats, with 0 log 0 = 0."""
    prob = prob_BC.astype(np.float64)
    return -np.sum(prob * np.log(np.where(prob > 0, prob, 1.0)), axis=-1)


def log_guess(prob_BC: np.ndarray) -> np.ndarray:
    """float32 (B, C): natural logarithms of the probabilities, clamped to `FLOOR`."""
    return np.log(np.maximum(prob_BC.astype(np.float32), np.float32(FLOOR)))


def cross_entropy(target_BC: np.ndarray, log_guess_BC: np.ndarray) -> np.ndarray:
    """float64 (B,): -sum target log guess, in nats (FKD equation 2)."""
    return -np.einsum("bc,bc->b", target_BC, log_guess_BC).astype(np.float64)


def total_variation(a_BC: np.ndarray, b_BC: np.ndarray) -> np.ndarray:
    """float64 (B,): half the sum of absolute differences, between 0 and 1."""
    return 0.5 * np.abs(a_BC.astype(np.float64) - b_BC).sum(axis=-1)


def divergence(stored_BC: np.ndarray, target_BC: np.ndarray) -> np.ndarray:
    """float64 (B,): KL(stored || target) in nats.

    Infinite if the target is zero for a class with at least `FLOOR`.
    """
    counts = stored_BC >= FLOOR
    stored = np.where(counts, stored_BC, 1.0).astype(np.float64)
    with np.errstate(divide="ignore"):
        log_target = np.log(np.where(counts, target_BC, 1.0).astype(np.float64))
    return np.sum(np.where(counts, stored * (np.log(stored) - log_target), 0.0), axis=-1)


def background(prob_BC: np.ndarray, truth_B: np.ndarray) -> np.ndarray:
    """bool (B,): crops that probably do not show their image's class.

    The largest probability is below `UNSURE`, and the image's class has less than `ABSENT`.
    """
    true_B = prob_BC[np.arange(len(prob_BC)), np.maximum(truth_B, 0)]
    return (truth_B >= 0) & (prob_BC.max(axis=1) < UNSURE) & (true_B < ABSENT)
