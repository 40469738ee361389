"""A tail is the teacher's own last stage, differentiable and frozen."""

from __future__ import annotations

import pytest
import timm
import tiny
import torch

from fkdpipe.common.errors import ModelError
from fkdpipe.networks import tails
from fkdpipe.networks.feature_layers import FeatureNetwork, Needs


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_a_swins_tail_of_its_own_map_is_its_last_map(family):
    teacher = tiny.network(family).eval()
    with torch.no_grad():
        made = FeatureNetwork(teacher, Needs(stages=(2,), final=True))(torch.randn(2, 3, 64, 64))
        tail = tails.of(teacher, 2)
        assert torch.allclose(tail(made.stages[2]), made.final, atol=1e-6)
    assert (tail.channels, tail.stride) == (made.stages[2].shape[1], 2)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("swin_tiny_patch4_window7_224", 15_368_112),
        ("swin_small_patch4_window7_224", 15_368_112),
        ("swin_base_patch4_window7_224", 27_306_560),
        ("swin_large_patch4_window7_224", 61_407_072),
    ],
)
def test_parameters_of_swin_tails(name, millions):
    with torch.device("meta"):
        teacher = timm.create_model(name)
    counted = sum(
        p.numel() for part in (teacher.layers[-1], teacher.norm) for p in part.parameters()
    )
    assert counted == millions


def test_a_vits_tail_of_its_own_tokens_is_its_last_map():
    """To the digit where the network has no class token."""
    torch.manual_seed(0)
    teacher = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, class_token=False, global_pool="avg", **tiny.PLAIN
    ).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        blocks = teacher.forward_intermediates(x, intermediates_only=True, norm=False)
        final = FeatureNetwork(teacher, Needs(final=True))(x).final
        assert torch.allclose(tails.of(teacher, 2)(blocks[-3]), final, atol=1e-6)
        assert torch.allclose(tails.of(teacher, 1)(blocks[-2]), final, atol=1e-6)


@pytest.mark.parametrize("family", ["vit", "beit"])
def test_plain_tails_are_the_last_blocks_and_the_norm(family):
    teacher = tiny.network(family).eval()
    map_BCHW = torch.randn(2, 48, 4, 4)
    with torch.no_grad():
        made = tails.of(teacher, 2)(map_BCHW)
        tokens = map_BCHW.flatten(2).transpose(1, 2)
        if family == "beit":  # its relative positions count a class token
            tokens = torch.cat([teacher.cls_token.expand(2, -1, -1), tokens], 1)
        expected = teacher.norm(teacher.blocks[3](teacher.blocks[2](tokens)))[:, -16:]
    assert torch.allclose(made.flatten(2).transpose(1, 2), expected, atol=1e-6)


@pytest.mark.parametrize("family", ["swin", "vit", "beit"])
def test_gradients_go_through_a_frozen_tail(family):
    teacher = tiny.network(family).eval().requires_grad_(False)
    tail = tails.of(teacher, 2)
    map_BCHW = torch.randn(2, tail.channels, 4, 4, requires_grad=True)
    tail(map_BCHW).square().sum().backward()
    assert map_BCHW.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_networks_without_a_known_tail_are_refused():
    with pytest.raises(ModelError, match="Set tpp = false"):
        tails.of(tiny.network("resnet"), 2)
    with pytest.raises(ModelError, match="has 4 blocks"):
        tails.of(tiny.network("vit"), 4)
