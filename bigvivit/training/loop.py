"""Epochs of train steps, timed and reported."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from bigvivit.config import OptimConfig
from bigvivit.memory.engine import Engine
from bigvivit.memory.measure import measure_peak_over_ranks
from bigvivit.training.metrics import MetricsLog
from bigvivit.training.step import LabelledClips, train_step

WARMUP_STEPS = 3
"""Left out of the time per step: workers start, kernels are chosen, ZeRO-3 records the order of its fetches."""


class ClipLoader(Protocol):
    """This rank's micro-batches of one epoch: a DataLoader."""

    sampler: Any
    """Has `set_epoch`, as DistributedSampler does."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class LoopResult:
    """What a training run took."""

    steps: int
    seconds_per_step: float
    """Median over the steps after the first few, waiting for data included."""
    loss: float
    """Mean over ranks and over the steps since the last report but one."""


def train(
    engine: Engine, loader: ClipLoader, optim: OptimConfig, *, steps: int, log_every: int, metrics: MetricsLog | None
) -> LoopResult:
    """Run `steps` optimizer steps. Every rank calls it; `metrics` is rank 0's."""
    engine.module.train()
    losses, seconds, loss = [], [], float("nan")
    before = time.perf_counter()
    for step, (epoch, batches) in enumerate(itertools.islice(micro_batches(loader, optim.accumulate), steps), start=1):
        lr = engine.scheduler.get_last_lr()[0]  # before the step, which sets the next one
        result = train_step(engine, batches, label_smoothing=optim.label_smoothing)
        losses.append(result.loss)
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
        if step % log_every == 0 or step == steps:
            loss = mean_over_ranks(torch.stack(losses).mean())
            losses.clear()
            peak = measure_peak_over_ranks(engine.device)
            if metrics is not None:
                recent = statistics.median(seconds[-log_every:])
                record = {
                    "step": step,
                    "epoch": epoch,
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": result.grad_norm,
                    "seconds_per_step": recent,
                    "clips_per_second": optim.batch_size / recent,
                    "peak_bytes": peak.peak_bytes,
                    "seconds_left": recent * (steps - step),
                }
                metrics.report(record)
    return LoopResult(steps, statistics.median(seconds[WARMUP_STEPS:] or seconds), loss)


def micro_batches(loader: ClipLoader, accumulate: int) -> Iterator[tuple[int, list[LabelledClips]]]:
    """(epoch, micro-batches of one step), without end; what does not fill a step at an epoch's end is dropped."""
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(len(loader) // accumulate):
            yield epoch, [next(batches) for _ in range(accumulate)]


def mean_over_ranks(value: torch.Tensor) -> float:
    """The mean of a scalar over ranks. Every rank must call it."""
    if dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)
