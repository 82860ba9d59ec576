"""Weights from one model to another: stage 1 to stage 2, and a change of the number of frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

POSITIONS = "temporal.position_embeddings"


@dataclass(frozen=True)
class Skipped:
    """A tensor that was not transferred."""

    name: str
    reason: str


def interpolate_positions(table: Tensor, length: int) -> Tensor:
    """A position table [1, 1 + n, d] for `length` positions instead of n.

    The CLS row stays; the others are interpolated linearly, first on first and last on last
    (`scipy.ndimage.zoom(order=1)` in the original; reference/vivit.md §1, "Changing frame count").
    """
    cls, rows = table[:, :1], table[:, 1:]
    rows = F.interpolate(rows.transpose(1, 2), size=length, mode="linear", align_corners=True).transpose(1, 2)
    return torch.cat([cls, rows], dim=1)


@torch.no_grad()
def transfer(target: dict[str, Tensor], source: dict[str, Tensor]) -> list[Skipped]:
    """Copy `source` into the tensors of `target` that have the same name, in place; returns what did not take part.

    Only the temporal positions may differ in shape: they are interpolated.
    """
    skipped = []
    for name, tensor in target.items():
        if name not in source:
            skipped.append(Skipped(name, "not in the source: keeps its initial value"))
            continue
        value = source[name]
        if name == POSITIONS and value.shape != tensor.shape and value.shape[-1] == tensor.shape[-1]:
            value = interpolate_positions(value, tensor.shape[1] - 1)
        if value.shape != tensor.shape:
            skipped.append(
                Skipped(
                    name, f"shape {list(value.shape)} in the source, {list(tensor.shape)} here: keeps its initial value"
                )
            )
            continue
        tensor.copy_(value)
    skipped += [Skipped(name, "has no counterpart here") for name in source if name not in target]
    return skipped
