"""A trial's steps on a virtual GPU: PyTorch's own allocator, dispatcher and choice of kernels, and nothing of ours.

What is left of guessing lies outside of PyTorch: the context's size, which `forecast/overhead.py` has with its range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.overhead import context

if TYPE_CHECKING:
    from bigvivit.trial import Trial

STEPS = 3


@dataclass(frozen=True)
class VirtualStep:
    """What a step came to on a card with one size of the context."""

    allocated_bytes: int
    reserved_bytes: int
    out_of_memory: str | None
    """PyTorch's own words; None where it fits."""


@dataclass(frozen=True)
class VirtualVerdict:
    """Whether a step fits a card, in the worst, the expected and the best case of what the driver takes."""

    expected: VirtualStep
    fits: tuple[bool, bool, bool]
    capacities: tuple[int, int, int]
    """Bytes that PyTorch's allocator can have in each."""


def why_not_virtual(trial: Trial, card: Accelerator) -> str | None:
    """Why a step cannot be run on a virtual GPU; None where it can, as far as that is known before it is tried."""
    if trial.world > 1 or trial.ds is not None or trial.fsdp:
        return "one process stands for one of several ranks"
    if card.on_host:
        return "the step is a CPU's"
    return None if card.device is not None else f"{card.name} is not a card of the table that NVIDIA made"


def run_on_virtual_gpu(trial: Trial, card: Accelerator, steps: int = STEPS) -> VirtualVerdict:
    """Run the trial's steps on a card that is not there. Raises ConfigError where there can be no virtual GPU, or what
    the trial's own building raises."""
    from bigvivit.forecast.virtual_gpu import virtual_gpu

    part = context(card)
    total, taken = card.memory_bytes, part.expected_bytes
    # The library takes the expected context off what the card has: another context is another memory.
    totals = [total - (size - taken) for size in (part.high_bytes, part.expected_bytes, part.low_bytes)]
    runs: dict[int, VirtualStep] = {}

    def run(memory_bytes: int) -> VirtualStep:
        if memory_bytes not in runs:
            with virtual_gpu(card.name, memory_bytes=memory_bytes, context_bytes=taken) as gpu:
                runs[memory_bytes] = gpu.call(take_steps, trial.to_json(), steps)
        return runs[memory_bytes]

    worst, middle, best = totals
    expected = run(middle)
    if expected.out_of_memory is None:
        room = worst - taken
        fits = expected.reserved_bytes <= room or run(worst).out_of_memory is None, True, True
    else:
        fits = False, False, run(best).out_of_memory is None
    return VirtualVerdict(expected, fits, tuple(value - taken for value in totals))  # type: ignore[arg-type]


def take_steps(text: str, steps: int) -> VirtualStep:
    """In a process on virtual GPUs: the trial built and trained. Weights and clips have no values, and need none."""
    import torch

    from bigvivit.assemble import choose_device
    from bigvivit.forecast.trace import repeat_batch
    from bigvivit.memory.out_of_memory import is_out_of_memory
    from bigvivit.training.step import train_step
    from bigvivit.trial import Trial, build_trial

    trial, device = Trial.from_json(text), choose_device("cuda")
    failed = None
    try:
        engine, batch = build_trial(trial, device, fake=True)
        for _ in range(steps):
            train_step(engine, repeat_batch(batch, trial.accumulate))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = ". ".join(str(error).split(". ")[:2])  # what it tried to allocate; the rest is advice
    return VirtualStep(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), failed)


def try_virtual_gpu(trial: Trial, card: Accelerator) -> VirtualVerdict | str:
    """The verdict, or the reason why there is none, in one line: what is not answered ends the child, and a trace can
    still be made."""
    from bigvivit.forecast.virtual_gpu import VirtualGpuError

    reason = why_not_virtual(trial, card)
    if reason is not None:
        return reason
    try:
        return run_on_virtual_gpu(trial, card)
    except (ConfigError, VirtualGpuError) as error:
        return " ".join(str(error).split())
