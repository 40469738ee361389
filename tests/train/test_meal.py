"""MEAL V2's discriminator: its loss in closed form, whose gradient goes where."""

from __future__ import annotations

import math

import pytest
import torch
from pipeline import make_store, train

from fkdpipe.networks.feature_layers import Outputs
from fkdpipe.train.methods.interface import Targets
from fkdpipe.train.methods.meal import Meal, Settings
from fkdpipe.train.settings import OptimizerSettings


def sides(batch: int = 6, classes: int = 64) -> tuple[torch.Tensor, Targets]:
    logits = torch.randn(batch, classes, requires_grad=True)
    prob = torch.softmax(torch.randn(batch, classes), dim=1)
    return logits, Targets(prob_BC=prob, truth_BC=prob)


def test_a_discriminator_that_cannot_tell_costs_ln_2():
    method = Meal(Settings(), 64)
    torch.nn.init.zeros_(method.discriminator[-2].weight)
    torch.nn.init.zeros_(method.discriminator[-2].bias)
    logits, targets = sides()
    terms = method.loss(Outputs(logits=logits), targets)
    assert terms["discriminator"].tolist() == pytest.approx([math.log(2)] * 6)


def test_the_loss_is_the_batchs_binary_cross_entropy():
    """Slow twin: both sides in one batch, [1, 0] for the student and [0, 1] for the teacher."""
    method = Meal(Settings(discriminator_weight=2.0), 64)
    logits, targets = sides()
    both = method.discriminator(torch.cat([logits, targets.prob_BC]))
    wanted = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 6)
    slow = 2.0 * torch.nn.BCEWithLogitsLoss()(both, wanted)
    terms = method.loss(Outputs(logits=logits), targets)
    torch.testing.assert_close(terms["discriminator"].mean(), slow)


def test_reversal_turns_the_students_gradient_and_no_other():
    made = {}
    for reverse in (False, True):
        torch.manual_seed(0)
        method = Meal(Settings(reverse=reverse, shrink=2), 64)
        for layer in method.discriminator[::2]:
            torch.nn.init.ones_(layer.bias)  # none of its units at rest
        torch.manual_seed(1)
        logits, targets = sides()
        method.loss(Outputs(logits=logits), targets)["discriminator"].sum().backward()
        made[reverse] = (logits.grad, method.discriminator[0].weight.grad)
    assert made[False][0].abs().sum() > 0
    torch.testing.assert_close(made[True][0], -made[False][0])
    torch.testing.assert_close(made[True][1], made[False][1])


def test_a_student_trains_with_it(tmp_path, folder, teacher):
    store = make_store(tmp_path / "store", folder, [teacher])
    result = train(
        tmp_path / "run",
        folder,
        store,
        method={"name": "meal", "shrink": 2},
        optimizer=OptimizerSettings(lr=0.02, auxiliary_lr=1e-3),
    )
    assert result.steps
