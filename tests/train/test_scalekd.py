"""ScaleKD: sizes and numbers of the authors' code, and where gradients go."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from feature_maps import context, outputs, targets

from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.networks.feature_layers import FeatureNetwork, Needs
from fkdpipe.train import methods
from fkdpipe.train.methods import scalekd
from fkdpipe.train.methods.projectors import Attention, Cap

PLAIN = Attention(heads=2, softmax_scale=1.0, layer_norm=False)


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_equal_opposite_and_orthogonal_maps():
    """The code's sums over 7 x 7 positions: 0, 4 HW and 2 HW; ours are means over positions."""
    x = maps(3, 8, 7, 7)
    assert scalekd.spatial(x, x).abs().max() < 1e-10
    assert torch.allclose(scalekd.spatial(-x, x) * 49, torch.full((3,), 196.0))
    first, second = torch.zeros(2, 3, 8, 7, 7)
    first[:, 0], second[:, 1] = 2.0, 0.3
    assert torch.allclose(scalekd.spatial(first, second) * 49, torch.full((3,), 98.0))


def test_the_spatial_distance_is_two_less_twice_the_cosine():
    x, y = maps(4, 8, 5, 5), maps(4, 8, 5, 5, seed=1)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1)
    expected = (2 - 2 * cosine).mean((1, 2))
    assert torch.allclose(scalekd.spatial(x, y), expected, atol=1e-5)
    scale = maps(4, 1, 5, 5, seed=2).abs() + 0.1
    assert torch.allclose(scalekd.spatial(scale * x, y), expected, atol=1e-5)


def test_weights_are_the_codes_at_7_x_7_and_14_x_14():
    settings = scalekd.Settings()
    assert settings.spatial_weight == pytest.approx(0.08 * 49) == pytest.approx(0.02 * 196)
    assert settings.frequency_weight == pytest.approx(0.06 * 49) == pytest.approx(0.015 * 196)


def cosine_transform(side: int) -> torch.Tensor:
    """Orthonormal DCT-II as a matrix."""
    n = torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(math.pi / side * (n[None] + 0.5) * n[:, None]) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix


def test_leaving_the_mean_out_equals_the_cosine_transform_without_its_zero_frequency():
    x = maps(2, 4, 6, 9).double()
    rows, columns = cosine_transform(6), cosine_transform(9)
    coefficients = rows @ x @ columns.T
    coefficients[:, :, 0, 0] = 0
    back = rows.T @ coefficients @ columns
    made = scalekd.without_mean(x.float())
    assert torch.allclose(made.double(), back, atol=1e-6)
    assert made.mean((2, 3)).abs().max() < 1e-6
    assert torch.allclose(scalekd.without_mean(made), made, atol=1e-6)


def test_the_frequency_distance_does_not_see_channel_means():
    x, y = maps(3, 8, 4, 4), maps(3, 8, 4, 4, seed=1)
    plain = scalekd.frequency(x, y)
    shifted = scalekd.frequency(x + maps(1, 8, 1, 1, seed=2), y + maps(3, 8, 1, 1, seed=3))
    assert torch.allclose(plain, shifted, atol=1e-5)
    assert scalekd.frequency(maps(3, 8, 1, 1), maps(3, 8, 1, 1, seed=1)).abs().max() == 0
    flat = torch.ones(3, 8, 4, 4, requires_grad=True)
    scalekd.frequency(flat, y).sum().backward()
    assert torch.isfinite(flat.grad).all()


@pytest.mark.parametrize(
    ("shape", "width", "grid", "own_query", "count"),
    [
        ((1024, 14, 14), 384, (14, 14), True, 12_129_280),  # ResNet-50 -> Swin-S, stage 3
        ((2048, 7, 7), 768, (7, 7), True, 47_535_872),
        ((1024, 14, 14), 768, (14, 14), True, 17_861_632),  # ResNet-50 -> Swin-L
        ((2048, 7, 7), 1536, (7, 7), False, 70_117_376),
    ],
)
def test_projectors_have_the_authors_parameters(shape, width, grid, own_query, count):
    attention = Attention(heads=None, softmax_scale=5.0, layer_norm=False)
    with torch.device("meta"):
        made = Cap(shape, width, grid, attention, own_query=own_query)
    assert sum(p.numel() for p in made.parameters()) == count


def test_heads_are_the_released_ones():
    attention = Attention(heads=None, softmax_scale=5.0, layer_norm=False)
    for width, heads in ((384, 3), (768, 6), (50, 1)):
        with torch.device("meta"):
            assert Cap((4, 2, 2), width, (2, 2), attention, own_query=True).heads == heads
    with pytest.raises(ModelError, match="5 heads do not divide 48 channels; use 4"):
        Cap((4, 2, 2), 48, (2, 2), Attention(5, 5.0, False), own_query=True)


def test_a_cap_equals_its_formula_written_out():
    torch.manual_seed(0)
    cap = Cap((6, 4, 4), 8, (2, 2), Attention(2, 5.0, False), own_query=True).eval()
    x = maps(3, 6, 4, 4)
    with torch.no_grad():
        memory = (cap.stem(x) + cap.positions).flatten(2).transpose(1, 2)
        query = torch.relu(cap.query @ cap.query_stem[0].weight.T + cap.query_stem[0].bias)
        q, k, v = cap.to_q(query), cap.to_k(memory), cap.to_v(memory)
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            scores = 5.0 * (q[:, part] @ k[..., part].transpose(1, 2)) / 4**0.5
            heads.append(scores.softmax(2) @ v[..., part])
        y = cap.norm(cap.out(torch.cat(heads, 2)))
        y = y + cap.ffn(y)
        made = cap(x)
    assert made.shape == (3, 8, 2, 2)
    assert torch.allclose(made.flatten(2).transpose(1, 2), y, atol=1e-5)


def test_a_caps_positions_belong_to_their_tokens():
    """Exchanging positions of the map together with their embeddings changes nothing."""
    torch.manual_seed(0)
    cap = Cap((6, 4, 4), 8, (2, 2), PLAIN, own_query=True).eval()
    cap.stem[0] = torch.nn.Conv2d(6, 6, 1)  # a 3 x 3 stem mixes neighbours
    x = maps(2, 6, 4, 4)
    order = torch.randperm(16)

    def moved(y: torch.Tensor) -> torch.Tensor:
        return y.flatten(2)[:, :, order].unflatten(2, (4, 4))

    with torch.no_grad():
        plain = cap(x)
        cap.positions.copy_(moved(cap.positions))
        assert torch.allclose(cap(moved(x)), plain, atol=1e-5)
        assert not torch.allclose(cap(x), plain, atol=1e-3)


def test_a_query_from_outside_takes_the_place_of_the_learnt_one():
    cap = Cap((6, 4, 4), 8, (2, 2), PLAIN, own_query=False)
    assert "query" not in dict(cap.named_parameters())
    x = maps(3, 6, 4, 4)
    assert not torch.allclose(cap(x, maps(3, 8, 2, 2)), cap(x, maps(3, 8, 2, 2, seed=1)))


def pair(family="swin", batch=3, **settings):
    """A method for made-up student maps and a tiny teacher's real outputs."""
    teacher = tiny.network(family, seed=1).eval().requires_grad_(False)
    with torch.no_grad():
        given = FeatureNetwork(teacher, Needs(final=True))(maps(batch, 3, 64, 64))
    ours = outputs(batch, {2: (6, 4)}, final=(9, 2), seed=1)
    torch.manual_seed(0)
    table = {"name": "scalekd", **settings}
    method = methods.build(table, context(ours, given, teacher_network=teacher))
    return method, ours, given, teacher


SWITCHES = [
    ({"dfm": False, "tpp": False, "soft_weight": 0.0}, {"hard", "spatial"}),
    ({"tpp": False, "soft_weight": 0.0}, {"hard", "spatial", "frequency"}),
    ({"dfm": False, "soft_weight": 0.0}, {"hard", "spatial", "proxy_spatial"}),
    (
        {"soft_weight": 0.0},
        {"hard", "spatial", "proxy_spatial", "frequency", "proxy_frequency"},
    ),
    ({}, {"hard", "kd", "spatial", "proxy_spatial", "frequency", "proxy_frequency"}),
    ({"projector": "linear", "tpp": False}, {"hard", "kd", "spatial", "frequency"}),
    ({"projector": "conv", "tpp": False}, {"hard", "kd", "spatial", "frequency"}),
    (
        {"adaptive_queries": False},
        {"hard", "kd", "spatial", "proxy_spatial", "frequency", "proxy_frequency"},
    ),
]


@pytest.mark.parametrize(("settings", "terms"), SWITCHES)
def test_every_row_of_table_9_has_its_terms_and_no_unused_module(settings, terms):
    method, ours, given, teacher = pair(**settings)
    made = method.loss(ours, targets(given))
    assert set(made) == terms
    assert all(term.shape == (3,) for term in made.values())
    sum(term.sum() for term in made.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert ours.final.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["swin", "swinv2", "vit", "beit"])
def test_the_proxy_path_trains_the_last_but_one_stage_alone(family):
    method, ours, given, teacher = pair(family)
    terms = method.loss(ours, targets(given))
    (terms["proxy_spatial"] + terms["proxy_frequency"]).sum().backward()
    assert ours.stages[2].grad.abs().sum() > 0
    assert ours.final.grad is None
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None for p in method.last.parameters())


def test_queries_carry_gradients_to_the_proxy_projectors():
    """They are not detached; learnt queries cut the way."""
    for adaptive in (True, False):
        method, ours, given, _ = pair(adaptive_queries=adaptive)
        terms = method.loss(ours, targets(given))
        (terms["spatial"] + terms["frequency"]).sum().backward()
        reached = [p.grad is not None for p in method.proxy.parameters()]
        assert all(reached) == any(reached) == adaptive


def test_terms_are_the_written_formula():
    method, ours, given, _ = pair()
    method.eval()
    with torch.no_grad():
        terms = method.loss(ours, targets(given))
        proxy = method.tail(method.proxy["frequency"](ours.stages[2]))
        made = method.last["frequency"](ours.final, proxy)
        centred = [x - x.mean((2, 3), keepdim=True) for x in (made, given.final)]
        units = [x / x.norm(dim=1, keepdim=True) for x in centred]
        summed = (units[0] - units[1]).square().sum((1, 2, 3))
        soft = torch.softmax(given.logits, 1)
        cross = -(soft * torch.log_softmax(ours.logits, 1)).sum(1)
    positions = given.final.shape[2] * given.final.shape[3]
    assert torch.allclose(terms["frequency"], 2.94 / positions * summed, atol=1e-4)
    assert torch.allclose(terms["kd"], 0.5 * cross, atol=1e-5)
    hard = torch.nn.functional.cross_entropy(ours.logits, torch.arange(3), reduction="none")
    assert torch.allclose(terms["hard"], 0.5 * hard, atol=1e-5)


def test_the_papers_weights_of_the_tasks_can_be_had():
    code, ours, given, _ = pair()
    paper, _, _, _ = pair(soft_weight=1.0, hard_weight=1.0)
    for name in ("hard", "kd"):
        half, whole = (m.loss(ours, targets(given))[name] for m in (code, paper))
        assert torch.allclose(whole, 2 * half)


def test_kd_is_the_divergence_and_the_teachers_entropy():
    method, ours, given, _ = pair()
    terms = method.loss(ours, targets(given))
    soft = torch.softmax(given.logits, 1)
    entropy = -(soft * soft.log()).sum(1)
    divergence = (soft * (soft.log() - torch.log_softmax(ours.logits, 1))).sum(1)
    assert torch.allclose(terms["kd"] / 0.5 - divergence, entropy, atol=1e-5)


def test_the_teachers_tail_is_no_part_of_the_method():
    method, _, _, teacher = pair()
    method.train()
    assert not teacher.training
    ids = {id(p) for p in teacher.parameters()}
    assert not ids & {id(p) for p in method.parameters()}
    assert not [key for key in method.state_dict() if "tail" in key]


@pytest.mark.parametrize(
    ("student", "norm"),
    [("resnet", "BatchNorm2d"), ("convnext", "LayerNorm2d"), ("swin", "LayerNorm2d")],
)
def test_the_stem_takes_the_students_kind_of_norm(student, norm):
    teacher = tiny.network("swin").eval()
    ours, given = outputs(1, {2: (6, 4)}, final=(9, 2)), outputs(1, {}, final=(192, 2))
    made = methods.build(
        {"name": "scalekd"},
        context(ours, given, teacher_network=teacher, student_network=tiny.network(student)),
    )
    assert type(made.last["spatial"].stem[1]).__name__ == norm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector": "linear"}, "tpp = false"),
        ({"soft_weight": 2.0}, "hard_weight: .*soft_weight is 2.0"),
        ({"soft_weight": -1.0, "hard_weight": 1.0}, "soft_weight must be a number of at least 0"),
        ({"heads": [0, 3]}, r"heads\[0\] must be a whole number above 0; found 0"),
        ({"softmax_scale": 0.0}, "softmax_scale must be a number above 0"),
        ({"spatial_weight": -1.0}, "spatial_weight must be a number of at least 0"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        methods.parse({"name": "scalekd", **change})


def test_a_teacher_without_a_tail_is_refused_with_a_way_out():
    with pytest.raises(
        ModelError, match=r"unknown tail for ResNet\. Set tpp = false, or use a Swin"
    ):
        pair("resnet")
    method, ours, given, _ = pair("resnet", tpp=False)
    assert "spatial" in method.loss(ours, targets(given))
