"""Self-supervised teachers: a ResNet with the projection head that it was trained with.

As in FKD section 3.4, the head's scores before softmax are stored, so that the temperature can be
chosen in training. The backbone is timm's; the checkpoints are the authors' files.

References:
    Chen et al., "Improved Baselines with Momentum Contrastive Learning" (MoCo v2), section 2.
    Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"
    (SwAV), section 3.

Letters: B batch, D backbone width, H hidden width, E embedding, P prototypes.
"""

from __future__ import annotations

from typing import Literal

import timm
import torch
from torch import nn
from torch.nn.functional import normalize

from fkdpipe.common.errors import ModelError

Kind = Literal["moco", "swav"]


class Projected(nn.Module):
    """Backbone and projection head, with prototypes for SwAV.

    MoCo v2: Linear(D, D), ReLU, Linear(D, E); the output is the L2-normalised embedding (B, E).
    SwAV: Linear(D, H), BatchNorm, ReLU, Linear(H, E), L2, then its dot product with each
    prototype (B, P).
    """

    num_classes: int  # width of the output, named as in other classifiers

    def __init__(
        self, backbone: nn.Module, head: nn.Module, embedding: int, prototypes: int | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.prototypes = nn.Linear(embedding, prototypes, bias=False) if prototypes else None
        self.num_classes = prototypes or embedding

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        embedding = normalize(self.head(self.backbone(pixels_B3HW)).float(), dim=1)
        return embedding if self.prototypes is None else self.prototypes(embedding)


def build(
    kind: Kind, name: str, state: dict[str, torch.Tensor], *, where: str
) -> tuple[Projected, dict[str, torch.Tensor]]:
    """Build a teacher for a published checkpoint; return it and the state dict with renamed keys.

    Args:
        name: timm's name of the backbone; its parameters have the same names as torchvision's.
        where: the model's name for messages.

    Raises:
        ModelError: the checkpoint has no head of that kind.
    """
    state = _renamed(kind, state)
    try:
        widths = [state[key].shape for key in state if key.startswith("head.") and "weight" in key]
        linears = [(shape[1], shape[0]) for shape in widths if len(shape) == 2]
        (inner, hidden), (_, embedding) = linears
    except ValueError:
        raise ModelError(
            f"{where} has no two-layer {kind} projection head; give the checkpoint as it was "
            "published.",
            code="no-head",
        ) from None
    norm = [nn.BatchNorm1d(hidden)] if kind == "swav" else []
    head = nn.Sequential(nn.Linear(inner, hidden), *norm, nn.ReLU(), nn.Linear(hidden, embedding))
    prototypes = state["prototypes.weight"].shape[0] if "prototypes.weight" in state else None
    backbone = timm.create_model(name, num_classes=0)
    return Projected(backbone, head, embedding, prototypes), state


def _renamed(kind: Kind, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the checkpoint's keys; drop those not of the network (queues, momentum)."""
    if kind == "moco":
        encoder = {
            key.split("encoder_q.", 1)[1]: value
            for key, value in state.items()
            if "encoder_q." in key
        }
        heads = {f"fc.{k}": f"head.{k}" for k in (0, 2)}
    else:
        encoder = {key.removeprefix("module."): value for key, value in state.items()}
        heads = {f"projection_head.{k}": f"head.{k}" for k in (0, 1, 3)}
        heads["prototypes"] = "prototypes"
    renamed = {}
    for key, value in encoder.items():
        layer, _, last = key.rpartition(".")
        renamed[f"{heads[layer]}.{last}" if layer in heads else f"backbone.{key}"] = value
    return renamed
