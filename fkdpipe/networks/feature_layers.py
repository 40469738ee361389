"""Feature layers of timm networks: penultimate vectors and stage maps, next to the logits.

Features are read through timm's interfaces (`forward_intermediates`, `forward_head`,
`get_classifier`) inside one module without hooks, so that DDP and torch.compile see everything.

CNNs end in an activation. The penultimate vectors before it (for KDEP) and after it (for SRD and
the classifier) differ, and after pooling neither can be computed from the other. The last
activation is therefore removed from the network and applied here; no parameter changes.

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

# Networks that end in a LayerNorm or a residual sum: pre and post are the same.
_WITHOUT_ACTIVATION = (
    "Beit", "Cait", "ConvNeXt", "Eva", "MlpMixer", "SwinTransformer", "SwinTransformerV2",
    "VisionTransformer", "VisionTransformerDistilled",
)  # fmt: skip


# As in ScaleKD, which uses blocks 3, 6, 9 and 12 of a 12-block transformer as stages.
PLAIN_STAGES = 4


@dataclass(frozen=True)
class Needs:
    """Feature layers to compute.

    Attributes:
        penultimate: penultimate vector after the last activation. pre: before it.
        stages: stage maps, counted from the end; 1 is the last stage. In plain transformers and
            mixers, a quarter of the blocks counts as a stage.
        final: the last map after the final norm.
    """

    penultimate: bool = False
    pre: bool = False
    stages: tuple[int, ...] = ()
    final: bool = False


def needs_of(layers: Collection[str]) -> Needs:
    """The feature layers for stored features: pre, post or map."""
    return Needs(pre="pre" in layers, penultimate="post" in layers, final="map" in layers)


@dataclass(frozen=True)
class Outputs:
    """Outputs of a network; layers that were not requested are None.

    Attributes:
        logits: (B, C); (B, 0) for stored features. penultimate, pre: (B, D).
        stages: (B, C, H, W) by stage from the end, after the activation, before the final norm.
        final: (B, C, H, W), the last map after the final norm.
    """

    logits: torch.Tensor
    penultimate: torch.Tensor | None = None
    pre: torch.Tensor | None = None
    stages: dict[int, torch.Tensor] = field(default_factory=dict)
    final: torch.Tensor | None = None

    def take(self, rows: slice) -> Outputs:
        """A slice of the batch."""

        def rows_of(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else value[rows]

        return Outputs(
            logits=self.logits[rows],
            penultimate=rows_of(self.penultimate),
            pre=rows_of(self.pre),
            stages={number: value[rows] for number, value in self.stages.items()},
            final=rows_of(self.final),
        )


class FeatureNetwork(nn.Module):
    """A network that returns feature layers. `network` keeps its own state dict, for export.

    Raises:
        ModelError: this network does not have a requested feature layer.
    """

    network: Any  # timm networks share methods, not a base class

    def __init__(self, network: Any, needs: Needs) -> None:
        super().__init__()
        self.network = network
        self.needs = needs
        _check_interface(network, needs)
        self._after_pooling = type(network).__name__ == "MobileNetV3"
        self._activation: nn.Module | None = None
        self._ends_stage = False  # whether the activation belongs to the last stage's map
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
            final, stages = network.forward_intermediates(
                pixels_B3HW, indices=self._indices, norm=False, output_fmt="NCHW"
            )
            maps = dict(zip(sorted(needs.stages, reverse=True), stages, strict=True))
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
        """The layers after the penultimate vector: one, or two in distilled DeiTs."""
        if not hasattr(self.network, "get_classifier"):
            return nn.ModuleList([classifiers.last_linear(self.network)])
        classifier = self.network.get_classifier()
        return nn.ModuleList(classifier if isinstance(classifier, tuple) else [classifier])

    def _last_map(self, final: torch.Tensor) -> torch.Tensor:
        last_map = to_map(self._activated(final), self.network)
        if type(self.network).__name__ == "ConvNeXt" and hasattr(self.network.head, "norm"):
            last_map = self.network.head.norm(last_map)  # timm applies it after pooling
        return last_map

    def _activated(self, final: torch.Tensor) -> torch.Tensor:
        if self._activation is None or self._after_pooling:
            return final
        return self._activation(final)

    def _head(self, final: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """(penultimate before the last activation, after it, logits)."""
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
    """Refuse feature layers if the network lacks timm's methods for reading them."""
    methods = []
    if needs.penultimate or needs.pre or needs.stages or needs.final:
        methods += ["forward_features", "forward_head", "get_classifier", "num_features"]
    if needs.stages:
        methods += ["forward_intermediates", "feature_info"]
    missing = [name for name in methods if not hasattr(network, name)]
    if missing:
        raise ModelError(
            f"{type(network).__name__} has no {', '.join(missing)}, which features are read "
            "through, as in timm; without these a network gives only labels. timm has most of "
            "torchvision's networks: name one without the prefix torchvision:.",
            code="no-layer",
        )


def _stage_index(network: Any, k: int) -> int:
    """Index of stage k in the network's `feature_info`; both count from the end."""
    reductions = [info["reduction"] for info in network.feature_info]
    stages = len(reductions)
    even = len(set(reductions)) == 1 and stages >= PLAIN_STAGES
    if even:
        stages = PLAIN_STAGES
    if not 1 <= k <= stages:
        raise ModelError(
            f"{type(network).__name__} has {stages} stages; stage {k} from the end was requested.",
            code="no-stage",
        )
    return -1 - (k - 1) * len(reductions) // PLAIN_STAGES if even else -k


def example(network: FeatureNetwork, size: tuple[int, int], device: torch.device) -> Outputs:
    """Outputs for one black image, for their shapes."""
    was_training = network.training
    with torch.no_grad():
        outputs = network.eval()(torch.zeros(1, 3, *size, device=device))
    network.train(was_training)
    return outputs


def to_map(features: torch.Tensor, network: Any) -> torch.Tensor:
    """(B, C, H, W) from an output of `forward_features`: NCHW, NHWC (Swin) or prefixed tokens."""
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
        raise ModelError(f"{type(network).__name__}: {tokens} tokens do not form a square map.")
    return side, side


def width(network: Any) -> int:
    """D, the width of the penultimate vector."""
    return int(getattr(network, "head_hidden_size", None) or network.num_features)


def has_activation(network: Any) -> bool:
    """Whether the network has a last activation, so that pre and post differ."""
    return type(network).__name__ not in _WITHOUT_ACTIVATION


def _take_activation(network: Any) -> tuple[nn.Module | None, bool]:
    """Replace the last activation by the identity. Return it, or None without one, and whether it
    belongs to the last stage.
    """
    kind = type(network).__name__
    if kind in _WITHOUT_ACTIVATION:
        return None, False
    owner, name = _last_activation(network, kind)
    activation = getattr(owner, name)
    if isinstance(activation, nn.Identity):
        raise ModelError(f"{kind}: its last activation is already removed.")
    if hasattr(activation, "inplace"):
        activation.inplace = False  # its input is an output too
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
