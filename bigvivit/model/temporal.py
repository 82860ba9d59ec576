"""The temporal transformer of the factorised encoder: one vector per tubelet in, one per clip out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from bigvivit.model.blocks import apply_stochastic_depth


class TemporalTransformer(nn.Module):
    """Pre-norm ViT layers over the tubelets of a clip, with a CLS token and learned positions of their own.

    The layers are Hugging Face's ViT layers: the same attention through SDPA as in the towers.
    """

    def __init__(self, *, tubelets: int, width: int, heads: int, mlp: int, depth: int, droplayer: float) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=mlp,
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + tubelets, width))
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(depth))
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        apply_stochastic_depth(self.layers, droplayer)

    def forward(self, vectors: Tensor) -> Tensor:
        """[b, tubelets, width] → [b, width]."""
        cls = self.cls_token.expand(len(vectors), -1, -1)
        hidden = torch.cat([cls, vectors], dim=1) + self.position_embeddings
        for layer in self.layers:
            hidden = layer(hidden)
        return self.layernorm(hidden[:, 0])
