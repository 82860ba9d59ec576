"""What memory was really used, and by whose count."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Peak:
    """The largest peak over all ranks since the process started."""

    peak_bytes: int
    how: str
    """Which counter said so."""


def measure_peak(device: torch.device) -> Peak:
    """This process's peak so far; on CUDA of tensors, on the CPU of everything the process held."""
    if device.type == "cuda":
        return Peak(torch.cuda.max_memory_allocated(device), "CUDA allocator, allocated")
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return Peak(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process RSS, imports included")


def measure_free(device: torch.device) -> int:
    """Bytes that this process could still take: on CUDA also what PyTorch keeps cached, on the CPU also under its
    limit on data (RLIMIT_DATA), if there is one."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    status = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(status["MemAvailable"].split()[0]) * 1024
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit != resource.RLIM_INFINITY:
        free = min(free, max(limit - measure_data(), 0))
    return free


def measure_data() -> int:
    """Bytes of this process that count towards RLIMIT_DATA."""
    own = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(own["VmData"].split()[0]) * 1024


def least_over_ranks(value: int, device: torch.device) -> int:
    """The smallest of all ranks' values. Every rank must call it."""
    if not dist.is_initialized():
        return value
    least = torch.tensor(value, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def measure_peak_over_ranks(device: torch.device) -> Peak:
    """The maximum of `measure_peak` over ranks. Every rank must call it."""
    peak = measure_peak(device)
    if not dist.is_initialized():
        return peak
    value = torch.tensor(peak.peak_bytes, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return Peak(int(value), peak.how)


@dataclass
class Allocations:
    """What PyTorch's CPU allocator handed out and took back while this was counted, on the thread that counted."""

    peak_bytes: int = 0
    """Most that was live at once, of what was allocated since."""
    left_bytes: int = 0
    """Still live at the end."""
    peak_operator: str = ""
    """The innermost operator that ran at the peak."""


@contextmanager
def count_cpu_allocations() -> Iterator[Allocations]:
    """The allocator's own events, by PyTorch's profiler: exact, but blind to other threads. Filled at the end."""
    found = Allocations()
    gc.collect()  # else what others left behind would be seen to go, and never have come
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = 0
    for event in events:
        if event.name() == "[memory]":
            found.left_bytes += event.nbytes()
            if found.left_bytes > found.peak_bytes:
                found.peak_bytes, now = found.left_bytes, event.start_ns()
    for event in events:  # the last to begin before the peak and to end after it is the innermost
        if event.name() != "[memory]" and event.start_ns() <= now <= event.start_ns() + event.duration_ns():
            found.peak_operator = event.name()
