"""FitNet: the projected map against the teacher's, by mean squared error."""

from __future__ import annotations

import pytest
import torch
from feature_maps import context, outputs, targets

from fkdpipe.common.errors import UsageError
from fkdpipe.train import methods


def pair(stages=(1,), sides=(4, 4), grad=True):
    student = outputs(3, {2: (6, 8)}, final=(6, sides[0]), seed=1)
    teacher = outputs(3, {2: (10, 8)}, final=(10, sides[1]), seed=2, grad=False)
    table = {"name": "fitnet", "stages": stages, "feature_weight": 2.0}
    return methods.build(table, context(student, teacher)), student, teacher


def test_the_feature_term_is_the_weighted_mean_square_of_the_difference():
    method, student, teacher = pair()
    terms = method.loss(student, targets(teacher))
    weight, bias = (p.detach() for p in method.projectors["1"].parameters())
    made = torch.einsum("bchw,dc->bdhw", student.final, weight[:, :, 0, 0]) + bias[:, None, None]
    expected = 2.0 * (made - teacher.final).pow(2).mean(dim=(1, 2, 3))
    assert set(terms) == {"hard", "feature_1"}
    assert torch.allclose(terms["feature_1"], expected, atol=1e-5)


def test_auxiliary_modules_are_one_projector_per_stage():
    method, _, _ = pair((1, 2))
    assert sum(p.numel() for p in method.parameters()) == 2 * (6 * 10 + 10)


@pytest.mark.parametrize("sides", [(8, 4), (4, 8)])
def test_maps_of_other_grids_are_averaged_or_repeated(sides):
    method, student, teacher = pair(sides=sides)
    term = method.loss(student, targets(teacher))["feature_1"]
    made = method.projectors["1"](student.final)
    if sides[0] > sides[1]:
        same = torch.nn.functional.avg_pool2d(made, 2)
    else:
        same = made.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(term, 2.0 * (same - teacher.final).pow(2).mean((1, 2, 3)), atol=1e-5)


def test_the_papers_two_stages_and_kd_have_a_term_each():
    student = outputs(3, {2: (6, 8)}, final=(6, 4))
    teacher = outputs(3, {2: (10, 8)}, final=(10, 4), grad=False)
    table = {"name": "fitnet", "stages": (1, 2), "soft_weight": 1.0, "temperature": 4.0}
    terms = methods.build(table, context(student, teacher)).loss(student, targets(teacher))
    assert set(terms) == {"hard", "kd", "feature_1", "feature_2"}
    soft = torch.softmax(teacher.logits / 4, 1)
    divergence = (soft * (soft.log() - torch.log_softmax(student.logits / 4, 1))).sum(1)
    assert torch.allclose(terms["kd"], 16 * divergence, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"stages": ()},
        {"stages": (1, 1)},
        {"stages": (0,)},
        {"temperature": 0.0},
        {"soft_weight": -1.0},
    ],
)
def test_settings_that_cannot_be_right_are_refused(change):
    with pytest.raises(UsageError):
        methods.parse({"name": "fitnet", **change})
