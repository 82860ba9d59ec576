"""Weights into a model that has none yet, one piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

Fill = Callable[[str, nn.Module], None]
"""Copies the weights of the piece of this name into a module on the CPU that has room for them."""


def load_pieces(
    pieces: Iterable[tuple[str, nn.Module]],
    fill: Fill,
    *,
    storage: torch.dtype,
    device: torch.device,
    shard: Callable[[nn.Module], None] | None,
) -> None:
    """Materialise, fill and place each piece before the next one exists.

    At no time is more than one piece whole in memory beside what has been placed: with `shard`, a rank never holds
    the tower. The pieces come on the meta device; they are filled in `storage`, so no copy in the file's type is kept.
    """
    for name, piece in pieces:
        piece.to(storage).to_empty(device="cpu")
        fill(name, piece)
        piece.to(device)  # also before sharding, which moves parameters but not buffers
        if shard is not None:
            shard(piece)
