"""A trial's steps on a virtual GPU: PyTorch's own allocator, dispatcher and choice of kernels, and nothing of ours.

Of several ranks only the fullest run, each in a process of its own; the others are taken to do what it does. What is
left of guessing lies outside of PyTorch: context and NCCL, which `forecast/overhead.py` has with their range.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.overhead import context, forecast_overhead

if TYPE_CHECKING:
    from bigvivit.trial import Trial

STEPS = 3


@dataclass(frozen=True)
class VirtualStep:
    """What a step came to on a card with one size of what lies outside of PyTorch, on its fullest rank."""

    allocated_bytes: int
    reserved_bytes: int
    locked_bytes: int
    """Page-locked on the host, by PyTorch and for a tower that waits there."""
    out_of_memory: str | None
    """PyTorch's own words; None where it fits."""


@dataclass(frozen=True)
class VirtualVerdict:
    """Whether a step fits a card, in the worst, the expected and the best case of what the driver takes."""

    expected: VirtualStep
    fits: tuple[bool, bool, bool]
    capacities: tuple[int, int, int]
    """Bytes that PyTorch's allocator can have in each."""


def why_not_virtual(card: Accelerator) -> str | None:
    """Why there can be no virtual GPU like this card, in one line; None where there can."""
    from bigvivit.forecast.virtual_gpu import environment

    if card.on_host:
        return "the step is a CPU's"
    if card.device is None:
        return f"{card.name} is not a card of the table that NVIDIA made"
    try:
        environment(card.name)
    except ConfigError as error:
        return " ".join(str(error).split())
    return None


def run_on_virtual_gpu(trial: Trial, card: Accelerator, steps: int = STEPS) -> VirtualVerdict:
    """Run the trial's steps on a card that is not there. Raises ConfigError where there can be no virtual GPU, or what
    the trial's own building raises."""
    low, middle, high = forecast_overhead(card, ranks=trial.world).outside()
    # The library takes the expected size off what the card has: another size is another memory.
    worst, expected, best = (card.memory_bytes - (size - middle) for size in (high, middle, low))
    step = run_fullest_rank(trial, card, expected, steps)
    if step.out_of_memory is None:
        in_worst = step.reserved_bytes <= worst - middle
        fits = in_worst or run_fullest_rank(trial, card, worst, steps).out_of_memory is None, True, True
    else:
        fits = False, False, run_fullest_rank(trial, card, best, steps).out_of_memory is None
    return VirtualVerdict(step, fits, (worst - middle, expected - middle, best - middle))


def run_fullest_rank(trial: Trial, card: Accelerator, memory_bytes: int, steps: int = STEPS) -> VirtualStep:
    """The steps with so much memory: of the first rank for which it is not enough, or of the one that takes most."""
    from bigvivit.forecast.virtual_gpu import virtual_gpu
    from bigvivit.trial import fullest_ranks

    found, taken = [], context(card).expected_bytes
    for rank in fullest_ranks(trial):
        with virtual_gpu(card.name, memory_bytes=memory_bytes, context_bytes=taken) as gpu:
            found.append(gpu.call(take_steps, trial.to_json(), rank, steps))
        if found[-1].out_of_memory is not None:
            return found[-1]
    return max(found, key=lambda step: step.reserved_bytes)


def take_steps(text: str, rank: int, steps: int) -> VirtualStep:
    """In a process on virtual GPUs: the trial built and trained on one rank. Weights and clips have no values, and need
    none."""
    import torch

    from bigvivit.assemble import choose_device
    from bigvivit.forecast.trace import repeat_batch
    from bigvivit.forecast.virtual_gpu.alone import start_alone
    from bigvivit.forecast.virtual_gpu.inside import let_collectives_go, locked_bytes
    from bigvivit.memory.out_of_memory import is_out_of_memory
    from bigvivit.training.step import train_step
    from bigvivit.trial import Trial, build_trial

    trial, device = Trial.from_json(text), choose_device("cuda")
    if trial.world > 1 or trial.ds is not None or trial.fsdp:
        start_alone(rank, trial.world)
    if trial.ds is not None:
        from bigvivit.memory.zero import init_deepspeed

        os.environ["DS_ACCELERATOR"] = "cuda"
        init_deepspeed(device)
    failed = None
    try:
        engine, batch = build_trial(trial, device, fake=True)
        for _ in range(steps):
            train_step(engine, repeat_batch(batch, trial.accumulate))
            let_collectives_go()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = ". ".join(str(error).split(". ")[:2])  # what it tried to allocate; the rest is advice
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return VirtualStep(allocated, reserved, locked_bytes(), failed)


def try_virtual_gpu(trial: Trial, card: Accelerator) -> VirtualVerdict | str:
    """The verdict, or the reason why there is none, in one line: what is not answered ends the child, and a trace can
    still be made."""
    from bigvivit.forecast.virtual_gpu import VirtualGpuError

    reason = why_not_virtual(card)
    if reason is not None:
        return reason
    try:
        return run_on_virtual_gpu(trial, card)
    except (ConfigError, VirtualGpuError) as error:
        return " ".join(str(error).split())
