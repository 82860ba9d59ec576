"""The compact adapter between the frozen tower and the temporal transformer (paper, §3.2, equation of stage 2)."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Adapter(nn.Module):
    """Two fully connected layers on each frame vector by itself.

    The paper says no more than that. Ours is residual with a second layer that starts at zero, so stage 2 starts from
    the very function that stage 1 ended with; the hidden layer is as wide as the vectors.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, vectors: Tensor) -> Tensor:
        """[b, n, width] → [b, n, width]."""
        return vectors + self.fc2(F.gelu(self.fc1(vectors)))
