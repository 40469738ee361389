"""Taps give what the network itself computes, before and after its last activation."""

from __future__ import annotations

import pytest
import timm
import torch

from fkdpipe.common.errors import ModelError
from fkdpipe.networks import feature_layers
from fkdpipe.networks.feature_layers import FeatureNetwork, Needs

# name, input side, options
WITH = [
    ("resnet18", 64),
    ("resnet50", 64),
    ("seresnet50", 64),
    ("mobilenetv1_100", 64),
    ("mobilenetv2_100", 64),
    ("mobilenetv3_small_050", 64),
    ("mobilenetv4_conv_small", 64),
    ("efficientnet_b0", 64),
    ("regnety_002", 64),
    ("resnetv2_50", 64),
    ("densenet121", 64),
    ("repvgg_a0", 64),
    ("regnetz_b16", 64),
]
WITHOUT = [
    ("convnext_atto", 64),
    ("swin_tiny_patch4_window7_224", 224),
    ("vit_tiny_patch16_224", 224),
    ("deit_tiny_distilled_patch16_224", 224),
    ("mixer_s16_224", 224),
    ("beit_base_patch16_224", 224),
    ("test_vit", 160),
]


def network(name: str):
    if name.startswith("densenet"):
        pytest.importorskip("timm", minversion="1.0.31")  # the first with its forward_intermediates
    torch.manual_seed(0)
    # zero_init_last makes a fresh ResNet's last block its shortcut alone, before = after
    options = (
        {"zero_init_last": False}
        if name.startswith(("resnet1", "resnet5", "seresnet", "regnety"))
        else {}
    )
    return timm.create_model(name, num_classes=7, **options).eval()


@pytest.mark.parametrize(("name", "side"), WITH + WITHOUT)
def test_taps_do_not_change_the_logits(name, side):
    model = network(name)
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        plain = model(x)
        expected_post = model.forward_head(model.forward_features(x), pre_logits=True)
        keys = list(model.state_dict())
        made = FeatureNetwork(model, Needs(penultimate=True, pre=True, stages=(1, 2), final=True))(
            x
        )
    assert torch.allclose(made.logits, plain, atol=1e-5)
    assert torch.allclose(made.penultimate, expected_post, atol=1e-5)
    assert made.penultimate.shape == made.pre.shape == (2, feature_layers.width(model))
    assert list(model.state_dict()) == keys
    assert set(made.stages) == {1, 2}
    assert all(m.dim() == 4 for m in (*made.stages.values(), made.final))
    assert made.stages[1].shape[1] == model.feature_info[-1]["num_chs"]


@pytest.mark.parametrize(("name", "side"), WITH)
def test_before_the_activation_differs_from_after(name, side):
    model = network(name)
    with torch.no_grad():
        made = FeatureNetwork(model, Needs(penultimate=True, pre=True))(
            torch.randn(2, 3, side, side)
        )
    assert feature_layers.has_activation(model)
    assert not torch.allclose(made.pre, made.penultimate)
    assert (made.pre < 0).any()


@pytest.mark.parametrize(("name", "side"), WITHOUT)
def test_without_an_activation_both_are_the_same(name, side):
    model = network(name)
    with torch.no_grad():
        made = FeatureNetwork(model, Needs(penultimate=True, pre=True))(
            torch.randn(1, 3, side, side)
        )
    assert not feature_layers.has_activation(model)
    assert torch.equal(made.pre, made.penultimate)


def test_pre_is_the_pooled_map_before_the_last_relu():
    model = network("resnet18")
    seen = {}
    hook = model.layer4[-1].act2.register_forward_pre_hook(
        lambda module, args: seen.update(map=args[0].clone())
    )
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
        hook.remove()
        made = FeatureNetwork(model, Needs(pre=True, stages=(1,)))(x)
    assert torch.allclose(made.pre, seen["map"].mean((2, 3)), atol=1e-6)
    assert torch.allclose(made.stages[1], seen["map"].relu(), atol=1e-6)


@pytest.mark.parametrize(("name", "side"), WITH)
def test_the_last_stages_map_is_the_same_with_and_without_the_tap(name, side):
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        plain = FeatureNetwork(network(name), Needs(stages=(1,)))(x)
        with_pre = FeatureNetwork(network(name), Needs(pre=True, stages=(1,)))(x)
    assert torch.allclose(plain.stages[1], with_pre.stages[1], atol=1e-5)


def test_the_final_map_of_a_convnext_is_normed_though_its_head_pools_first():
    model = network("convnext_atto")
    with torch.no_grad():
        made = FeatureNetwork(model, Needs(stages=(1,), final=True))(torch.randn(2, 3, 64, 64))
        mean = made.final.mean(1)
        assert torch.allclose(made.final, model.head.norm(made.stages[1]), atol=1e-5)
    assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-5)


def test_a_distilled_network_has_two_classifiers():
    made = FeatureNetwork(network("deit_tiny_distilled_patch16_224"), Needs(penultimate=True))
    made.classifier.requires_grad_(False)
    resting = {name for name, p in made.network.named_parameters() if not p.requires_grad}
    assert resting == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_the_final_map_is_normed_and_stages_are_not():
    model = network("swin_tiny_patch4_window7_224")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        made = FeatureNetwork(model, Needs(stages=(1,), final=True))(x)
        expected = model.forward_features(x).permute(0, 3, 1, 2)
    assert torch.allclose(made.final, expected, atol=1e-5)
    normed = model.norm(made.stages[1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(normed, expected, atol=1e-4)


# 0-based blocks that close the stages 4, 3, 2, 1 from the end, of 6, 8 and 12 blocks
@pytest.mark.parametrize(
    ("name", "closing"),
    [
        ("test_vit", (1, 2, 4, 5)),
        ("mixer_s16_224", (1, 3, 5, 7)),
        ("deit_tiny_patch16_224", (2, 5, 8, 11)),
    ],
)
def test_a_quarter_of_a_plain_networks_blocks_is_a_stage(name, closing):
    model = network(name)
    side = model.pretrained_cfg["input_size"][1]
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        blocks = model.forward_intermediates(x, intermediates_only=True)
        made = FeatureNetwork(model, Needs(stages=(1, 2, 3, 4)))(x)
    for k, block in zip((4, 3, 2, 1), closing, strict=True):
        assert torch.equal(made.stages[k], blocks[block])


def test_gradients_reach_the_network_through_every_tap():
    for layer in ("penultimate", "pre"):
        model = network("resnet18")
        made = FeatureNetwork(model, Needs(**{layer: True}))(torch.randn(2, 3, 64, 64))
        getattr(made, layer).sum().backward()
        assert model.conv1.weight.grad.abs().sum() > 0
        assert model.fc.weight.grad is None


def test_refusals():
    with pytest.raises(ModelError, match="stage 9 from the end"):
        FeatureNetwork(network("resnet18"), Needs(stages=(9,)))
    with pytest.raises(ModelError, match="Take layer post"):
        FeatureNetwork(timm.create_model("vgg11", num_classes=3), Needs(pre=True))
    model = network("resnet18")
    FeatureNetwork(model, Needs(pre=True))
    with pytest.raises(ModelError, match="taken out before"):
        FeatureNetwork(model, Needs(pre=True))
