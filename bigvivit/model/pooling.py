"""What a tubelet's patches say beyond its vector: attention with a query that is learnt."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead


class PatchPooling(nn.Module):
    """A query over the cells of a grid of patches, as in V-JEPA 2's attentive probe (arXiv:2506.09985).

    The attention and the layers behind it are SigLIP's pooling head, by Hugging Face. Where a patch lies the tower has
    told it. What comes out goes through a matrix that starts at zero: training begins with the very function that the
    tower's vectors alone would give.
    """

    def __init__(self, width: int, heads: int, mlp: int, grid: int) -> None:
        super().__init__()
        self.width, self.cells = width, grid**2
        config = SiglipVisionConfig(
            hidden_size=width, num_attention_heads=heads, intermediate_size=mlp, layer_norm_eps=1e-6
        )
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.pool = SiglipMultiheadAttentionPoolingHead(config)
        self.out = nn.Linear(width, width)

    def forward(self, patches: Tensor) -> Tensor:
        """[b, tubelets, grid² * width] → [b, tubelets, width]."""
        cells = patches.unflatten(-1, (self.cells, self.width)).flatten(0, 1)
        return self.out(self.pool(self.layernorm(cells))).unflatten(0, patches.shape[:2])
