"""From a trace to a verdict: what PyTorch's caching allocator on one card would make of it.

The allocator model was held to published recordings of real GPUs (`bench/allocator.py`), traces to the CPU allocator's
own count (`bench/forecast_accuracy.py`), and both to one H100 (`bigvivit calibrate`); what lies outside is a table of
constants with sources and ranges (`forecast/overhead.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version

from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.alloc_conf import AllocatorSettings
from bigvivit.forecast.allocator import Allocator, OutOfMemory
from bigvivit.forecast.corrections import Name
from bigvivit.forecast.overhead import Overhead, capacity, context, forecast_overhead
from bigvivit.forecast.segments import oldest_segment_first
from bigvivit.forecast.simulate import Run, simulate
from bigvivit.forecast.trace import Trace
from bigvivit.memory.plan import MemoryPlan

THREADS = 2
"""That run matrix products: the caller's, and autograd's. Each has a cuBLAS workspace."""


@dataclass(frozen=True)
class Verdict:
    """Whether a traced step fits a card, in the worst, the expected and the best case of what is not in the trace."""

    trace: Trace
    overhead: Overhead
    runs: tuple[Run, Run, Run]
    """With the least, the expected and the greatest capacity."""
    capacities: tuple[int, int, int]
    """Bytes that PyTorch's allocator can have in each."""

    @property
    def fits(self) -> tuple[bool, bool, bool]:
        """In the worst, the expected and the best case."""
        return tuple(run.out_of_memory is None for run in self.runs)  # type: ignore[return-value]

    @property
    def word(self) -> str:
        """`fits`, `does not fit`, or what lies between."""
        return describe_fit(self.fits)


def describe_fit(fits: tuple[bool, bool, bool]) -> str:
    """Whether it fits in the worst, the expected and the best case, in words."""
    worst, expected, best = fits
    if worst:
        return "fits"
    if expected:
        return "should fit"
    return "might fit" if best else "does not fit"


def judge(
    trace: Trace,
    accelerator: Accelerator,
    *,
    ranks: int,
    settings: AllocatorSettings | None = None,
    without: Collection[Name] = (),
) -> Verdict:
    """Replay the trace through the allocator model with what the card leaves. Raises ConfigError where that is nothing.

    The device's workspaces are requested first, as in the first matrix products of a run.
    """
    overhead = forecast_overhead(accelerator, ranks=ranks)
    capacities = capacity(accelerator, overhead)
    program = list(allocator_events(trace))
    runs = []
    for place, workspaces in zip(capacities, reversed(overhead.workspaces()), strict=True):
        allocator = Allocator(
            settings or AllocatorSettings(),
            capacity_bytes=place,
            oldest_segment_first=oldest_segment_first(version("torch")),
        )
        threads = 0 if "workspaces" in without else THREADS
        start = [("a", -1 - thread, workspaces, 0) for thread in range(threads)]
        runs.append(simulate([*start, *program], allocator))
    return Verdict(trace, overhead, (runs[0], runs[1], runs[2]), capacities)


def judge_on_host(trace: Trace, processor: Accelerator) -> Verdict:
    """Of a CPU's forecast: tensors have the memory that a process leaves, each its own part of it. Raises ConfigError
    where that is nothing."""
    overhead = Overhead((context(processor),))
    capacities = capacity(processor, overhead)
    peak, runs = max(trace.peak_bytes(), trace.building_peak_bytes()), []
    for place in capacities:
        short = None if peak <= place else OutOfMemory(peak - place, peak - place, place, place, place)
        runs.append(Run(AllocatorSettings(), peak, peak, peak, peak, out_of_memory=short))
    return Verdict(trace, overhead, (runs[0], runs[1], runs[2]), capacities)


def corrected_bytes(trace: Trace, overhead: Overhead) -> dict[Name, int]:
    """What each correction made: the most that was live at once because of it, or, below 0, what was never there."""
    most: dict[Name, int] = {"in-place": -trace.largest_third_bytes, "workspaces": THREADS * overhead.workspaces()[1]}
    kinds: dict[Name, str] = {"attention": "attention: ", "foreach": "aten._foreach"}
    for name, prefix in kinds.items():
        live = most[name] = 0
        for event in trace.events:
            if event.allocation.op.startswith(prefix):
                live += event.change
                most[name] = max(most[name], live)
    return most


def allocator_events(trace: Trace, device: str = "cpu") -> Iterator[tuple[str, int, int, int]]:
    """The trace as `simulate` takes it. A storage that is resized is another block."""
    blocks: dict[int, tuple[int, int]] = {}
    numbers = 0
    for event in trace.events:
        if event.allocation.device != device:
            continue
        number, size = event.allocation.number, event.change
        if number in blocks:
            block, before = blocks.pop(number)
            yield "f", block, 0, 0
            size += before
        if size > 0:
            blocks[number] = (numbers, size)
            yield "a", numbers, size, event.allocation.stream
            numbers += 1


def resolve_types(plan: MemoryPlan, accelerator: Accelerator) -> MemoryPlan:
    """The plan with every `auto` type as this card would choose it."""
    compute, autocast = plan.compute, plan.autocast
    has_bf16 = "bf16" in accelerator.rates or (accelerator.capability or 0) >= 80
    if compute == "auto":
        compute = "bf16" if has_bf16 else "fp32"
    if autocast == "auto":
        autocast = "bf16" if has_bf16 else "fp32"
    return replace(plan, compute=compute, autocast=autocast)
