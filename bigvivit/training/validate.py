"""Accuracy while training, on the model as it stands and on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from bigvivit.config import ConfigError
from bigvivit.memory.engine import Engine
from bigvivit.training.step import ClipLoader


def validate(engine: Engine, loader: ClipLoader) -> dict[str, float]:
    """`val_top1` and `val_loss` over all ranks' clips, each counted once, and how many `val_clips` that were.

    `loader` gives this rank's share, one view a clip: uint8 [b, 1, frames, 3, height, width]. Sharded engines need as
    many forwards on every rank, of as many clips: what a rank lacks it repeats, uncounted. Every rank must call it.
    Raises ConfigError where no clip can be read.
    """
    engine.module.eval()
    right, loss, count = (torch.zeros((), dtype=torch.float64, device=engine.device) for _ in range(3))
    rounds = most_over_ranks(len(loader), engine.device)
    batches = iter(loader)
    batch: Any = None
    with torch.no_grad():
        for number in range(rounds):
            batch = next(batches, batch)
            read = len(batch.clips)
            clips = batch.clips[:, 0] if read else batch.clips.new_zeros((1, *batch.clips.shape[2:]))
            logits = engine(clips[torch.arange(loader.batch_size) % len(clips)])[:read].float()
            if number < len(loader):
                labels = batch.labels.to(engine.device)
                right += (logits.argmax(1) == labels).sum()
                loss += F.cross_entropy(logits, labels, reduction="sum")
                count += read
    engine.module.train()
    totals = torch.stack([right, loss, count])
    if dist.is_initialized():
        dist.all_reduce(totals)
    if totals[2] == 0:
        raise ConfigError("data.val: none of its clips can be read; look at it with `bigvivit check`")
    return {
        "val_top1": float(totals[0] / totals[2]),
        "val_loss": float(totals[1] / totals[2]),
        "val_clips": int(totals[2]),
    }


def most_over_ranks(value: int, device: torch.device) -> int:
    """The largest of all ranks' values. Every rank must call it."""
    if not dist.is_initialized():
        return value
    most = torch.tensor(value, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
