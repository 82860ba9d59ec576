"""Weights piece by piece."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from bigvivit.memory.load import load_pieces


def test_one_piece_at_a_time_is_filled_placed_and_let_go() -> None:
    """With a sharder that keeps nothing, no second piece is ever whole in memory."""
    with torch.device("meta"):
        pieces = [(f"layers.{i}", nn.Linear(8, 8)) for i in range(4)]
    whole: list[set[str]] = []
    seen = []

    def fill(name: str, piece: nn.Module) -> None:
        whole.append({other for other, module in pieces if module.weight.device.type == "cpu"})
        seen.append((name, piece.weight.dtype))
        with torch.no_grad():
            for parameter in piece.parameters():
                parameter.fill_(int(name[-1]))

    def shard(piece: nn.Module) -> None:
        assert piece.weight.unique().tolist() == [float(len(seen) - 1)]
        piece.to_empty(device="meta")

    load_pieces(
        pieces,
        [module for _, module in pieces],
        fill,
        storage=torch.bfloat16,
        device=torch.device("cpu"),
        sharder=SimpleNamespace(shard=shard, finish=None),
    )
    assert whole == [{"layers.0"}, {"layers.1"}, {"layers.2"}, {"layers.3"}]
    assert seen == [(f"layers.{i}", torch.bfloat16) for i in range(4)]
