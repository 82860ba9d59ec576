"""Accuracy while training, on the model as it stands and on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from bigvivit.config import ConfigError
from bigvivit.memory.engine import Engine
from bigvivit.training.bank import head_scores
from bigvivit.training.step import BANK_NDIM, ClipLoader, cross_entropy


def validate(engine: Engine, loader: ClipLoader) -> dict[str, float]:
    """`val_top1` and `val_loss` over all ranks' clips, each counted once, and how many `val_clips` that were; of a
    probe bank those of the best head, and each head's (`head_scores`).

    `loader` gives this rank's share, one view a clip: uint8 [b, 1, frames, 3, height, width]. Sharded engines need as
    many forwards on every rank, of as many clips: what a rank lacks it repeats, uncounted. Every rank must call it.
    Raises ConfigError where no clip can be read.
    """
    engine.module.eval()
    right, loss, count = (torch.zeros((), dtype=torch.float64, device=engine.device) for _ in range(3))
    is_bank = False
    rounds = most_over_ranks(len(loader), engine.device)
    batches = iter(loader)
    batch: Any = None
    with torch.no_grad():
        for number in range(rounds):
            batch = next(batches, batch)
            read = len(batch.clips)
            clips = batch.clips[:, 0] if read else batch.clips.new_zeros((1, *batch.clips.shape[2:]))
            logits = engine(clips[torch.arange(loader.batch_size) % len(clips)])[..., :read, :].float()
            is_bank = logits.ndim == BANK_NDIM
            if number < len(loader):
                labels = batch.labels.to(engine.device)
                right = right + (logits.argmax(-1) == labels).sum(-1).double()
                loss = loss + cross_entropy(logits, labels, reduction="sum").double()
                count += read
    engine.module.train()
    totals = torch.stack([*right.view(-1), *loss.view(-1), count])
    if dist.is_initialized():
        dist.all_reduce(totals)
    if totals[-1] == 0:
        raise ConfigError("data.val: none of its clips can be read; look at it with `bigvivit check`")
    top1, losses = (totals[:-1] / totals[-1]).view(2, -1).tolist()
    scores = head_scores(top1, losses) if is_bank else {"val_top1": top1[0], "val_loss": losses[0]}
    return {**scores, "val_clips": int(totals[-1])}


def most_over_ranks(value: int, device: torch.device) -> int:
    """The largest of all ranks' values. Every rank must call it."""
    if not dist.is_initialized():
        return value
    most = torch.tensor(value, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
