"""A probe bank: many sets of adapter, temporal transformer and head over one pass of a frozen tower."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bigvivit.model.towers import Tower
from bigvivit.model.tubelet import to_tubelets
from bigvivit.model.vivit import VECTORS_NDIM, ViViT, build_vivit


class ProbeBank(nn.Module):
    """uint8 clips, or the tower's vectors of them, to the logits of every head (V-JEPA 2 trains its probes so,
    arXiv:2506.09985).

    Heads share nothing but what the tower gives: each is a ViViT without a tower of its own.
    """

    def __init__(self, tower: nn.Module, heads: Sequence[ViViT], tubelet: int, *, draws: bool) -> None:
        """`draws`: heads draw random numbers in training; all of them then see those that a run of one would."""
        super().__init__()
        self.tower, self.tubelet, self.draws = tower, tubelet, draws
        # A dictionary, since a list would be taken for repeated layers: recomputed, and sharded, one by one.
        self.heads = nn.ModuleDict({str(number): head for number, head in enumerate(heads)})

    def forward(self, clips: Tensor) -> Tensor:
        """uint8 [b, frames, 3, h, w], or vectors [b, tubelets, width] → logits [heads, b, classes]."""
        vectors = clips
        if clips.ndim != VECTORS_NDIM:
            vectors = self.tower(to_tubelets(clips, self.tubelet))
            vectors = vectors.view(len(clips), -1, vectors.shape[-1])
        logits = []
        for number, head in enumerate(self.heads.values(), start=1):
            restored = self.training and self.draws and number < len(self.heads)
            devices = [vectors.device] if vectors.device.type == "cuda" else []
            with torch.random.fork_rng(devices) if restored else nullcontext():
                logits.append(head(vectors))
        return torch.stack(logits)


def build_bank(tower: Tower, depths: Sequence[int], *, droplayer: float, tubelet: int, **options: Any) -> ProbeBank:
    """The bank around a tower that may still be on the meta device; every head has the initial weights that a model of
    its depth would have. `options` are those of `build_vivit`."""
    heads: list[ViViT] = []
    for depth in depths:
        # Layers are drawn once before they get their initial weights: here too as often as in a run of one.
        with torch.random.fork_rng([]) if heads else nullcontext():
            head = build_vivit(tower, temporal_depth=depth, droplayer=droplayer, tubelet=tubelet, **options)
        head.tower = nn.Identity()
        heads.append(head)
    return ProbeBank(tower, heads, tubelet, draws=droplayer > 0)
