"""Losses against slow twins and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import soft_cross_entropy

from fkdpipe.train import losses


def test_soft_cross_entropy_is_its_slow_twin():
    random = np.random.default_rng(0)
    logits = random.normal(size=(20, 7)) * 5
    target = random.dirichlet(np.ones(7), size=20)
    target[3] = np.eye(7)[2]
    made = losses.soft_cross_entropy(torch.tensor(logits), torch.tensor(target))
    expected = [soft_cross_entropy(z, p) for z, p in zip(logits, target, strict=True)]
    assert made.tolist() == pytest.approx(expected, rel=1e-5)


def test_soft_cross_entropy_closed_forms():
    flat = torch.zeros(1, 8)
    assert losses.soft_cross_entropy(flat, torch.full((1, 8), 1 / 8)).item() == pytest.approx(
        math.log(8)
    )
    prob = torch.tensor([[0.7, 0.2, 0.1]])
    entropy = -(prob * prob.log()).sum().item()
    assert losses.soft_cross_entropy(prob.log(), prob).item() == pytest.approx(entropy)


def test_classes_without_probability_add_nothing_even_at_minus_infinity():
    logits = torch.tensor([[1.0, -math.inf, 0.0]], requires_grad=True)
    target = torch.tensor([[0.5, 0.0, 0.5]])
    loss = losses.soft_cross_entropy(logits, target)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad[0, [0, 2]]).all()


def test_gradient_is_softmax_minus_target():
    logits = torch.randn(5, 6, dtype=torch.float32, requires_grad=True)
    target = torch.randn(5, 6).softmax(1)
    losses.soft_cross_entropy(logits, target).sum().backward()
    assert torch.allclose(logits.grad, logits.softmax(1) - target, atol=1e-6)
