"""ViViT's factorised encoder: tower per tubelet, adapter in stage 2, temporal transformer, head (paper, §3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bigvivit.model.adapter import Adapter
from bigvivit.model.blocks import TABLE_STD, init_weights
from bigvivit.model.pooling import PatchPooling
from bigvivit.model.temporal import POSITION_STD, TemporalInput, TemporalTransformer
from bigvivit.model.towers import Tower
from bigvivit.model.tubelet import to_tubelets

VECTORS_NDIM = 3
"""Axes of a batch of vectors; one of clips has two more."""


class ViViT(nn.Module):
    """uint8 clips to logits. `tower` may be replaced by anything that maps uint8 [n, t * 3, h, w] to [n, width], or
    with a `pooling` to what that takes."""

    def __init__(
        self,
        tower: nn.Module,
        adapter: Adapter | None,
        temporal: TemporalTransformer,
        head: nn.Linear,
        tubelet: int,
        pooling: PatchPooling | None = None,
    ) -> None:
        super().__init__()
        self.tower, self.pooling, self.adapter, self.temporal, self.head = tower, pooling, adapter, temporal, head
        self.tubelet = tubelet

    def forward(self, clips: Tensor) -> Tensor:
        """uint8 [b, frames, 3, h, w], or what the tower made of them, [b, tubelets, width] or with patches
        [b, tubelets, (1 + grid²) * width] → logits [b, classes]."""
        if clips.ndim == VECTORS_NDIM:
            vectors = clips.to(self.head.weight.device, non_blocking=True)
        else:
            vectors = self.tower(to_tubelets(clips, self.tubelet))
        vectors = vectors.view(len(clips), -1, vectors.shape[-1]).to(self.head.weight.dtype)
        patches = None
        if self.pooling is not None:
            vectors, patches = vectors.split([self.pooling.width, vectors.shape[-1] - self.pooling.width], -1)
        if self.temporal.mean_gate is not None:  # towers' vectors differ in size by two orders of magnitude
            vectors = F.layer_norm(vectors, vectors.shape[-1:])
        if self.pooling is not None:
            vectors = vectors + self.pooling(patches)
        if self.adapter is not None:
            vectors = self.adapter(vectors)
        return self.head(self.temporal(vectors))


def build_vivit(
    tower: Tower,
    *,
    frames: int,
    tubelet: int,
    classes: int,
    temporal_depth: int,
    droplayer: float,
    temporal_input: TemporalInput,
    adapter: bool,
    patch_grid: int = 0,
    seed: int,
) -> ViViT:
    """The model around a tower that may still be on the meta device; all else has its initial weights, on the CPU.

    The temporal layers are as wide as the tower's, as in the original. The head starts at zero: so do all logits.
    """
    spec = tower.spec
    with torch.device("cpu"):
        between = Adapter(spec.width) if adapter else None
        temporal = TemporalTransformer(
            tubelets=frames // tubelet,
            width=spec.width,
            heads=spec.heads,
            mlp=spec.mlp,
            depth=temporal_depth,
            droplayer=droplayer,
            form=temporal_input,
        )
        head = nn.Linear(spec.width, classes)
        pooling = PatchPooling(spec.width, spec.heads, spec.mlp, patch_grid) if patch_grid else None
    init_weights(temporal, seed, "temporal")
    with torch.no_grad():
        temporal.position_embeddings.mul_(POSITION_STD[temporal_input] / TABLE_STD)
    for start in (temporal.cls_token, temporal.mean_gate):
        if start is not None:
            nn.init.zeros_(start)
    if between is not None:
        init_weights(between, seed, "adapter")
        nn.init.zeros_(between.fc2.weight)
    if pooling is not None:
        init_weights(pooling, seed, "pooling")
        nn.init.zeros_(pooling.out.weight)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return ViViT(tower, between, temporal, head, tubelet, pooling)
