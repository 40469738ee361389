"""A timm network asked for more than its logits: penultimate vectors, stage maps.

Through timm's own interfaces (`forward_intermediates`, `forward_head`, `get_classifier`), without
hooks, inside one module, so that DDP and torch.compile see everything.

CNNs end in an activation: the penultimate vector before it (KDEP's) and after it (SRD's, the
classifier's) are different things and neither can be computed from the other once pooled. The last
activation is taken out of the network and applied here, which touches no parameter.

Letters: B batch, C classes, D penultimate width, H, W map.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fkdpipe.common.errors import ModelError
from fkdpipe.networks import classifiers

# Networks whose features end in a LayerNorm or plain residual sum: before and after are the same.
_WITHOUT_ACTIVATION = (
    "Beit", "Cait", "ConvNeXt", "Eva", "MlpMixer", "SwinTransformer", "SwinTransformerV2",
    "VisionTransformer", "VisionTransformerDistilled",
)  # fmt: skip


# ScaleKD takes blocks 3, 6, 9 and 12 of a transformer of twelve for its stages.
PLAIN_STAGES = 4


@dataclass(frozen=True)
class Needs:
    """What is asked of a network.

    Attributes:
        penultimate: after the last activation. pre: before it.
        stages: stage maps counted from the end: 1 is the last stage. Plain transformers and
            mixers have none: a quarter of their blocks counts as one.
        final: the last map after the final norm.
    """

    penultimate: bool = False
    pre: bool = False
    stages: tuple[int, ...] = ()
    final: bool = False


def needs_of(kept: Collection[str]) -> Needs:
    """What gives the features that a store keeps: pre, post or map."""
    return Needs(pre="pre" in kept, penultimate="post" in kept, final="map" in kept)


@dataclass(frozen=True)
class Outputs:
    """What a network gave. Only what was asked for is filled.

    Attributes:
        logits: (B, C); (B, 0) when the rest was read from a store. penultimate, pre: (B, D).
        stages: by number from the end, (B, C, H, W), after the activation, not normed.
        final: (B, C, H, W), the last map after the final norm.
    """

    logits: torch.Tensor
    penultimate: torch.Tensor | None = None
    pre: torch.Tensor | None = None
    stages: dict[int, torch.Tensor] = field(default_factory=dict)
    final: torch.Tensor | None = None

    def take(self, rows: slice) -> Outputs:
        """A part of the batch."""

        def some(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else value[rows]

        return Outputs(
            logits=self.logits[rows],
            penultimate=some(self.penultimate),
            pre=some(self.pre),
            stages={number: value[rows] for number, value in self.stages.items()},
            final=some(self.final),
        )


class FeatureNetwork(nn.Module):
    """A network with feature layers. `network` keeps its own state dict: it is what gets exported.

    Raises:
        ModelError: a feature layer that this family of networks does not have.
    """

    network: Any  # of some timm class; they share methods, not a base

    def __init__(self, network: Any, needs: Needs) -> None:
        super().__init__()
        self.network = network
        self.needs = needs
        _check_interface(network, needs)
        self._after_pooling = type(network).__name__ == "MobileNetV3"
        self._activation: nn.Module | None = None
        self._ends_stage = False  # or does the activation come after the last stage's map
        if needs.pre:
            self._activation, self._ends_stage = _take_activation(network)
        self._indices = [_stage_index(network, k) for k in sorted(needs.stages, reverse=True)]

    def forward(self, pixels_B3HW: torch.Tensor) -> Outputs:
        needs = self.needs
        if not (needs.penultimate or needs.pre or needs.stages or needs.final):
            return Outputs(logits=self.network(pixels_B3HW))
        network = self.network
        maps: dict[int, torch.Tensor] = {}
        if needs.stages:
            final, found = network.forward_intermediates(
                pixels_B3HW, indices=self._indices, norm=False, output_fmt="NCHW"
            )
            maps = dict(zip(sorted(needs.stages, reverse=True), found, strict=True))
        else:
            final = network.forward_features(pixels_B3HW)
        pre, penultimate, logits = self._head(final)
        if 1 in maps and self._activation is not None and self._ends_stage:
            maps[1] = self._activation(maps[1])
        return Outputs(
            logits=logits,
            penultimate=penultimate if needs.penultimate else None,
            pre=pre if needs.pre else None,
            stages=maps,
            final=self._last_map(final) if needs.final else None,
        )

    @property
    def classifier(self) -> nn.ModuleList:
        """The layers after the penultimate vector: one, or two of a network that was distilled."""
        if not hasattr(self.network, "get_classifier"):
            return nn.ModuleList([classifiers.last_linear(self.network)])
        found = self.network.get_classifier()
        return nn.ModuleList(found if isinstance(found, tuple) else [found])

    def _last_map(self, final: torch.Tensor) -> torch.Tensor:
        made = to_map(self._activated(final), self.network)
        if type(self.network).__name__ == "ConvNeXt" and hasattr(self.network.head, "norm"):
            made = self.network.head.norm(made)  # timm has it after pooling
        return made

    def _activated(self, final: torch.Tensor) -> torch.Tensor:
        if self._activation is None or self._after_pooling:
            return final
        return self._activation(final)

    def _head(self, final: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """(before the activation, after it, logits)."""
        network = self.network
        pre = None
        if self.needs.pre:
            pre = network.forward_head(final, pre_logits=True)
        if self._activation is None:
            penultimate = pre
            if penultimate is None:
                penultimate = network.forward_head(final, pre_logits=True)
        elif self._after_pooling:
            penultimate = self._activation(pre)
        else:
            activated = self._activation(final)
            penultimate = network.forward_head(activated, pre_logits=True)
        classifier = network.get_classifier()
        if isinstance(classifier, nn.Linear):
            return pre, penultimate, classifier(penultimate)
        return pre, penultimate, network.forward_head(self._activated(final))


def _check_interface(network: Any, needs: Needs) -> None:
    """Refuse feature layers of a network that lacks the methods they are read through."""
    asked = needs.penultimate or needs.pre or needs.stages or needs.final
    wanted = ["forward_features", "forward_head", "get_classifier", "num_features"] if asked else []
    wanted += ["forward_intermediates", "feature_info"] if needs.stages else []
    missing = [name for name in wanted if not hasattr(network, name)]
    if missing:
        raise ModelError(
            f"{type(network).__name__} has no {', '.join(missing)}; maps and features are taken "
            "through these, as timm's networks have them, and only labels without. timm has most "
            "of torchvision's networks: take one without the prefix torchvision:.",
            code="no-layer",
        )


def _stage_index(network: Any, k: int) -> int:
    """Where stage k from the end is among the network's features, counted from the end."""
    reductions = [info["reduction"] for info in network.feature_info]
    stages = len(reductions)
    even = len(set(reductions)) == 1 and stages >= PLAIN_STAGES
    if even:
        stages = PLAIN_STAGES
    if not 1 <= k <= stages:
        raise ModelError(
            f"{type(network).__name__} has {stages} stages; stage {k} from the end is asked for.",
            code="no-stage",
        )
    return -1 - (k - 1) * len(reductions) // PLAIN_STAGES if even else -k


def example(network: FeatureNetwork, size: tuple[int, int], device: torch.device) -> Outputs:
    """What a network gives for one black image: its shapes tell a method what to build."""
    was_training = network.training
    with torch.no_grad():
        made = network.eval()(torch.zeros(1, 3, *size, device=device))
    network.train(was_training)
    return made


def to_map(features: torch.Tensor, network: Any) -> torch.Tensor:
    """(B, C, H, W) of what `forward_features` gives: NCHW, NHWC (Swin) or tokens with prefix."""
    if features.dim() == 4:
        channels = int(network.num_features)
        last = features.shape[-1] == channels and features.shape[1] != channels
        return features.permute(0, 3, 1, 2) if last else features
    prefix = int(getattr(network, "num_prefix_tokens", 0))
    tokens = features[:, prefix:]
    side_h, side_w = _grid(network, tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side_h, side_w))


def _grid(network: Any, tokens: int) -> tuple[int, int]:
    embed = getattr(network, "patch_embed", None) or getattr(network, "stem", None)
    size = getattr(embed, "grid_size", None)
    if size is not None and size[0] * size[1] == tokens:
        return int(size[0]), int(size[1])
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ModelError(f"{type(network).__name__}: {tokens} tokens are no square map.")
    return side, side


def width(network: Any) -> int:
    """D, of the penultimate vector."""
    return int(getattr(network, "head_hidden_size", None) or network.num_features)


def has_activation(network: Any) -> bool:
    """Does the penultimate vector differ before and after a last activation?"""
    return type(network).__name__ not in _WITHOUT_ACTIVATION


def _take_activation(network: Any) -> tuple[nn.Module | None, bool]:
    """Replace the last activation by the identity and return it; None where there is none.

    And whether it is the end of the last stage.
    """
    kind = type(network).__name__
    if kind in _WITHOUT_ACTIVATION:
        return None, False
    owner, name = _last_activation(network, kind)
    activation = getattr(owner, name)
    if isinstance(activation, nn.Identity):
        raise ModelError(f"{kind}: its last activation has been taken out before.")
    if hasattr(activation, "inplace"):
        activation.inplace = False  # what is before it is wanted too
    setattr(owner, name, nn.Identity())
    beyond = kind in ("MobileNetV3", "ResNetV2") or owner is getattr(network, "bn2", None)
    return activation, not beyond


def _last_activation(network: Any, kind: str) -> tuple[nn.Module, str]:
    if kind == "ResNet":
        block = network.layer4[-1]
        return block, "act3" if hasattr(block, "act3") else "act2"
    if kind == "EfficientNet":
        norm = network.bn2
        if hasattr(norm, "act") and not isinstance(norm.act, nn.Identity):
            return norm, "act"
        return network.blocks[-1][-1].bn2, "act"
    if kind == "MobileNetV3":
        if isinstance(network.act2, nn.Identity):
            return network.norm_head, "act"
        return network, "act2"
    if kind == "RegNet":
        return list(network.s4.children())[-1], "act3"
    if kind == "ResNetV2":
        return network.norm, "act"
    if kind == "DenseNet":
        return network.features.norm5, "act"
    if kind == "ByobNet":
        if isinstance(network.final_conv, nn.Identity):
            return network.stages[-1][-1], "act"
        return network.final_conv.bn, "act"
    known = "ResNet, ResNetV2, EfficientNet, MobileNetV2, MobileNetV3, RegNet, DenseNet, ByobNet"
    raise ModelError(
        f"unknown last activation for {kind}. Features before it (layer pre) work for {known}, "
        "transformers, MLP-Mixer and ConvNeXt. Take layer post.",
        code="no-layer",
    )
