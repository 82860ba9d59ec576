"""Training a probe bank: an optimizer for each head, and which of them is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bigvivit.config import OptimConfig, ProbeHead
from bigvivit.training.optim import build_optimizer

BEST = "best_head"
"""Of a validation's scores: the number of the head that is best."""


def build_bank_optimizer(bank: nn.Module, heads: Sequence[ProbeHead], config: OptimConfig) -> torch.optim.Optimizer:
    """One optimizer whose groups say their head: rates, decay, state and gradient norm are each head's own."""
    optimizer: torch.optim.Optimizer | None = None
    modules: Mapping[str, nn.Module] = bank.heads  # type: ignore[assignment]
    for number, (module, head) in enumerate(zip(modules.values(), heads, strict=True)):
        own = build_optimizer(module, replace(config, lr=head.lr, weight_decay=head.weight_decay))
        for group in own.param_groups:
            group["head"] = number
        if optimizer is None:
            optimizer = own
        else:
            for group in own.param_groups:
                optimizer.add_param_group(group)
    assert optimizer is not None
    return optimizer


def head_scores(top1: Sequence[float], loss: Sequence[float]) -> dict[str, float]:
    """A validation's scores: those of every head, and under the usual names those of the best: the highest top-1, then
    the lowest loss. A head whose loss is no number any more has none."""
    scores: dict[str, float] = {}
    best = 0
    for number, (right, cost) in enumerate(zip(top1, loss, strict=True)):
        if math.isfinite(cost):
            scores |= {f"heads.{number}.val_top1": right, f"heads.{number}.val_loss": cost}
            if not math.isfinite(loss[best]) or (right, -cost) > (top1[best], -loss[best]):
                best = number
    return {"val_top1": top1[best], "val_loss": loss[best], BEST: best, **scores}


def head_table(
    heads: Sequence[ProbeHead], losses: Sequence[float], scores: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each head: settings, last training loss, last validation; None for one that diverged."""
    return [
        {
            "head": number,
            "lr": head.lr,
            "weight_decay": head.weight_decay,
            "depth": head.depth,
            "loss": loss if math.isfinite(loss) else None,
            "val_top1": scores.get(f"heads.{number}.val_top1"),
            "val_loss": scores.get(f"heads.{number}.val_loss"),
            "best": number == scores.get(BEST),
        }
        for number, (head, loss) in enumerate(zip(heads, losses, strict=True))
    ]
