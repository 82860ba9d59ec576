"""The train step. Training, benches, memory tests and forecasts all run this one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bigvivit.memory.engine import Engine

BANK_NDIM = 3
"""Axes of a probe bank's logits; of one model's there is one less."""


class LabelledClips(Protocol):
    """One micro-batch."""

    clips: Tensor
    """uint8 [b, frames, 3, height, width], or a frozen tower's vectors of them [b, tubelets, width]."""
    labels: Tensor
    """int64 [b]."""
    indices: Tensor
    """int64 [b], positions in the manifest."""


class ClipLoader(Protocol):
    """This rank's micro-batches of one epoch."""

    sampler: Any
    """Has `set_epoch(epoch, first_batch)`."""
    batch_size: int
    """Clips of a full micro-batch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to, on this rank."""

    loss: Tensor
    """Mean over the micro-batches, on the device: a scalar, or [heads] of a probe bank."""
    grad_norm: float
    """Norm of the whole gradient before clipping; of a bank the greatest that is finite."""


def train_step(engine: Engine, batches: Sequence[LabelledClips], *, label_smoothing: float = 0.0) -> StepResult:
    """Forward and backward of each micro-batch, then one update. `batches` are as many as the engine accumulates."""
    losses, grad_norm = [], None
    for batch in batches:
        # Clips stay where they are: the tower takes them to the device, chunk by chunk where it is a stream.
        labels = batch.labels.to(engine.device, non_blocking=True)
        logits = engine(batch.clips)
        loss = cross_entropy(logits, labels, label_smoothing=label_smoothing)
        engine.backward(loss if loss.ndim == 0 else loss.sum())  # a bank's heads share nothing: each gets its own
        grad_norm = engine.step()
        losses.append(loss.detach())
    assert grad_norm is not None, f"{len(batches)} micro-batches did not complete a step of engine {engine.name}"
    return StepResult(torch.stack(losses).mean(0), grad_norm)


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Of logits [b, classes] a scalar; of a probe bank's [heads, b, classes] each head's [heads], as it would be of the
    head alone."""
    if logits.ndim == BANK_NDIM:
        return torch.stack([F.cross_entropy(own.float(), labels, **options) for own in logits])
    return F.cross_entropy(logits.float(), labels, **options)
