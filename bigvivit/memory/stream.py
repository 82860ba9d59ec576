"""A frozen tower as a stream of layers: each is one unit that is fetched, cast, used and let go."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class StagedTower(Protocol):
    """What `memory` needs of a tower: embed → layers → pool, and the pieces its weights come in."""

    embed: nn.Module
    layers: nn.ModuleList
    pool: nn.Module

    def pieces(self) -> list[tuple[str, nn.Module]]:
        """Every parameter of the tower, in exactly one named piece."""
        ...


class StreamedLayer(nn.Module):
    """One piece of a frozen tower, computing in a type of its own whatever type it is stored in.

    It is also the unit that ZeRO-3 gathers (a leaf module): its parameters are whole for as long as its forward runs.
    """

    def __init__(self, layer: nn.Module, compute: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.compute = compute

    def forward(self, x: Tensor, **extras: Any) -> Any:
        weights: dict[str, Tensor] = dict(self.layer.named_parameters())
        if all(weight.dtype == self.compute for weight in weights.values()):
            return self.layer(x, **extras)
        # The cast copy lives for this call only: one layer in the compute type, the rest in the storage type.
        weights = {name: weight.to(self.compute) for name, weight in weights.items()}
        return torch.func.functional_call(self.layer, weights, (x,), extras)


class FrozenTower(nn.Module):
    """A tower without gradients and always in eval mode (paper, §3.2, stage 2)."""

    def __init__(self, tower: StagedTower, compute: torch.dtype) -> None:
        super().__init__()
        self.embed = StreamedLayer(tower.embed, compute)
        self.layers = nn.ModuleList(StreamedLayer(layer, compute) for layer in tower.layers)
        self.pool = StreamedLayer(tower.pool, compute)
        self.eval()

    def units(self) -> list[nn.Module]:
        """What is fetched one after the other, in the order of the tower's pieces."""
        return [self.embed, *self.layers, self.pool]

    def train(self, mode: bool = True) -> FrozenTower:
        """Stay in eval mode: dropout and stochastic depth of a tower that does not learn would only be noise."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Frame vectors [n, width] in the compute type, of uint8 tubelets [n, t * 3, height, width]."""
        # Autocast would turn norms, and with them the hidden states, back into fp32.
        with torch.autocast(pixels.device.type, enabled=False):
            hidden, extras = self.embed(pixels)
            for layer in self.layers:
                hidden = layer(hidden, **extras)
            return self.pool(hidden)
