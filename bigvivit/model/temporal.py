"""The temporal transformer of the factorised encoder: one vector per tubelet in, one per clip out."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from bigvivit.model.blocks import TABLE_STD, apply_stochastic_depth

TemporalInput = Literal["centred", "original"]
POSITION_STD = {"centred": 2.0, "original": TABLE_STD}
"""Standard deviation of the positions a training begins with: of the size of what they are added to, whose own is 1, or
order is never learnt. bench/learning_choices.py compares sizes on the vectors of real clips."""
STILL = 0.02
"""Size of a clip's changes, where its frame vectors have a size of 1, below which they are not made larger: a clip in
which nothing moves does not become noise."""


class TemporalTransformer(nn.Module):
    """Pre-norm ViT layers over the tubelets of a clip, with a CLS token and learned positions of their own.

    Its input is `centred`: what a clip's vectors have in common goes to the CLS token, through a gate that starts
    closed, and how they change, brought to unit size, to the tokens. So a few clips are not told apart by where they
    were filmed before what happens in them is looked at. `original` adds positions to the vectors as they are (ViViT,
    arXiv:2103.15691). The layers are Hugging Face's ViT layers: the same attention through SDPA as in the towers.
    """

    def __init__(
        self, *, tubelets: int, width: int, heads: int, mlp: int, depth: int, droplayer: float, form: TemporalInput
    ) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=mlp,
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mean_gate = nn.Parameter(torch.zeros(width)) if form == "centred" else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + tubelets, width))
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(depth))
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        apply_stochastic_depth(self.layers, droplayer)

    def forward(self, vectors: Tensor) -> Tensor:
        """[b, tubelets, width] → [b, width]."""
        cls = self.cls_token.expand(len(vectors), -1, -1)
        if self.mean_gate is not None:
            mean = vectors.mean(1, keepdim=True)
            vectors = to_unit_size(vectors - mean)
            cls = cls + self.mean_gate * mean
        hidden = torch.cat([cls, vectors], dim=1) + self.position_embeddings
        for layer in self.layers:
            hidden = layer(hidden)
        return self.layernorm(hidden[:, 0])


def to_unit_size(changes: Tensor) -> Tensor:
    """Each clip's changes [b, tubelets, width], over their root mean square."""
    return changes * (changes.square().mean((1, 2), keepdim=True) + STILL**2).rsqrt()
