"""Epochs of train steps, timed and reported."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from bigvivit.config import OptimConfig
from bigvivit.memory.engine import Engine
from bigvivit.memory.measure import greatest, measure_peaks
from bigvivit.memory.ranks import gather_over_ranks
from bigvivit.training.failed_clips import Failures
from bigvivit.training.metrics import MetricsLog
from bigvivit.training.order import describe_order, measure_order
from bigvivit.training.patience import Patience
from bigvivit.training.step import ClipLoader, LabelledClips, train_step
from bigvivit.training.validate import validate

log = logging.getLogger("bigvivit")
WARMUP_STEPS = 3
"""Left out of the time per step: workers start, kernels are chosen, ZeRO-3 records the order of its fetches."""


class LoadedClips(LabelledClips, Protocol):
    """One micro-batch as the loader made it."""

    failed: tuple[tuple[int, str], ...]
    """(position in the manifest, reason) of each video that another one stands in for."""
    decoders: tuple[str, ...]
    """Who read each clip."""


@dataclass(frozen=True)
class LoopResult:
    """What a training run took."""

    steps: int
    asked_to_stop: bool
    """Before its end, by `stop`."""
    order_change: float | None
    """`training.order.measure_order` before the first step; None where this part of the run did not have that step."""
    seconds_per_step: float
    """Median over the steps after the first few, waiting for data included."""
    losses: list[float]
    """Mean over ranks and over the steps since the last report but one; of a probe bank each head's."""
    scores: dict[str, float] | None
    """Of the last validation; None without one."""

    @property
    def loss(self) -> float:
        """The lowest."""
        return lowest(self.losses)


class NonFiniteError(Exception):
    """A loss or gradient that is no number any more; says at which step and for which clips of the manifest.

    Every rank raises it, since all have the same gradient norm. `ranks` are (loss, clips) of each: the clips are those
    of the ranks whose own loss is no number, or of all where the losses still are.
    """

    def __init__(self, step: int, grad_norm: float, ranks: list[tuple[float, list[int]]]) -> None:
        bad = [entry for entry in ranks if not math.isfinite(entry[0])] or ranks
        self.indices = [index for _, indices in bad for index in indices]
        super().__init__(f"step {step}: loss {bad[0][0]}, gradient norm {grad_norm}")


def train(
    engine: Engine,
    loader: ClipLoader,
    optim: OptimConfig,
    *,
    steps: int,
    log_every: int,
    metrics: MetricsLog | None,
    failures: Failures,
    first_step: int = 0,
    save_every: int = 0,
    save: Callable[[int, dict[str, float] | None], None] | None = None,
    stop: Callable[[int], bool] | None = None,
    val_loader: ClipLoader | None = None,
    patience: Patience | None = None,
) -> LoopResult:
    """Run up to `steps` optimizer steps, `first_step` of which are done. Every rank calls it; `metrics` is rank 0's.

    `save(step, scores of a validation)` is called on every rank after each `save_every` steps but the last, and after
    the step at which `stop(step)` says so, the last then. Validation comes before each save and at the end; the last
    step is also the one at which `patience` runs out, so with it each step that is saved is logged. Raises
    NonFiniteError, and TooManyFailuresError.
    """
    engine.module.train()
    losses: list[torch.Tensor] = []
    seconds: list[float] = []
    means, scores, step = [math.nan], None, first_step
    order_change, stopping = None, False
    before = time.perf_counter()
    stream = itertools.islice(micro_batches(loader, optim.accumulate, first_step), steps - first_step)
    for step, (epoch, batches) in enumerate(stream, start=first_step + 1):
        if step == 1:
            order_change = measure_order(engine, batches)
            log.info(describe_order(order_change))
            if metrics is not None and order_change is not None:
                metrics.write({"step": 0, "order_change": order_change})
            before = time.perf_counter()
        lr = max(engine.scheduler.get_last_lr())  # before the step, which sets the next one
        for batch in batches:
            failures.note(epoch, batch.failed, batch.decoders)
        result = train_step(engine, batches, label_smoothing=optim.label_smoothing)
        if not math.isfinite(result.grad_norm):  # of all ranks, and a number already: no extra wait for the device
            own = float(result.loss.mean()), [int(index) for batch in batches for index in batch.indices]
            raise NonFiniteError(step, result.grad_norm, gather_over_ranks(own))
        losses.append(result.loss)
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
        due = save_every > 0 and step % save_every == 0
        if step % log_every == 0 or step == steps or (due and patience is not None and patience.patience):
            mean = torch.stack(losses).mean(0).view(-1)
            *means, failed = mean_over_ranks(torch.cat([mean, mean.new_tensor([len(failures.pending)])]))
            losses.clear()
            if failed > 0:
                failures.gather()
            peak = greatest(measure_peaks(engine.device))
            if metrics is not None:
                recent = statistics.median(seconds[-log_every:])
                record = {
                    "step": step,
                    "epoch": epoch,
                    "loss": lowest(means),
                    "lr": lr,
                    "grad_norm": result.grad_norm,
                    "seconds_per_step": recent,
                    "clips_per_second": optim.batch_size / recent,
                    "peak_bytes": peak.peak_bytes,
                    **{f"memory.{key}": value for key, value in asdict(peak).items() if value is not None},
                    "seconds_left": recent * (steps - step),
                    **{f"heads.{n}.loss": loss for n, loss in enumerate(means) if len(means) > 1 and loss == loss},
                }
                metrics.report(record)
        stopping = stop is not None and stop(step)
        if val_loader is not None and (step == steps or (due and not stopping)):  # who stops a run does not wait for it
            with engine.averaged():
                scores = validate(engine, val_loader)
            if metrics is not None:
                metrics.report_validation({"step": step, "epoch": epoch, **scores})
        validated = scores if due and not stopping else None
        if save is not None and (due or stopping) and step < steps:
            failures.gather()  # a run that goes on from here must know them
            save(step, validated)
        if stopping:
            break
        if patience is not None and validated is not None and patience.runs_out(validated["val_top1"]):
            log.info("validation has not improved for %d checkpoints: training ends at step %d", patience.since, step)
            break
        before = time.perf_counter()  # validating and saving are not part of a step's time
    typical = statistics.median(seconds[WARMUP_STEPS:] or seconds)
    return LoopResult(step, stopping, order_change, typical, means, scores)


def lowest(losses: Sequence[float]) -> float:
    """The lowest that is a number: of a probe bank some heads may diverge."""
    return min((loss for loss in losses if math.isfinite(loss)), default=math.nan)


def micro_batches(loader: ClipLoader, accumulate: int, first_step: int = 0) -> Iterator[tuple[int, list[LoadedClips]]]:
    """(epoch, micro-batches of one step), without end; what does not fill a step at an epoch's end is dropped."""
    steps_per_epoch = len(loader) // accumulate
    skipped = first_step % steps_per_epoch
    for epoch in itertools.count(first_step // steps_per_epoch):
        loader.sampler.set_epoch(epoch, first_batch=skipped * accumulate)
        batches = iter(loader)
        for _ in range(steps_per_epoch - skipped):
            yield epoch, [next(batches) for _ in range(accumulate)]
        skipped = 0


def mean_over_ranks(values: torch.Tensor) -> list[float]:
    """The mean of each of these numbers [n] over ranks. Every rank must call it."""
    if dist.is_initialized():
        values = values.detach().clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return [float(value) for value in values]
