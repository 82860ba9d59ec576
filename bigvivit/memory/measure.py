"""What memory was really used, and by whose count: one function for each question.

| question | answer |
| --- | --- |
| peak of this process, by each counter there is | `measure_peak` |
| the same of every rank | `measure_peaks`; `greatest` of them |
| what could still be had | `measure_free` |
| what counts towards a limit on data | `measure_data`, `measure_limit`; how much of it is free, `measure_holes` |
| exactly what PyTorch's CPU allocator handed out in a piece of code | `count_cpu_allocations` |
"""

from __future__ import annotations

import bisect
import ctypes
import gc
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank since the process started, by each counter; None where there is no such counter."""

    process_bytes: int
    """Resident set in the host's memory, imports included."""
    allocated_bytes: int | None = None
    """Of tensors, by PyTorch's CUDA allocator."""
    reserved_bytes: int | None = None
    """What that allocator held of the device, its cache included."""
    retries: int | None = None
    """How often it gave its whole cache back to find a free block: each stalls the device. Not bytes."""
    device_bytes: int | None = None
    """In use on the whole device when asked, whoever uses it, by NVML; it keeps no peak."""

    @property
    def peak_bytes(self) -> int:
        """The one number to compare steps by: tensors on CUDA, on the CPU all that the process held."""
        return self.process_bytes if self.allocated_bytes is None else self.allocated_bytes

    @property
    def how(self) -> str:
        """Which counter `peak_bytes` is of."""
        return "process RSS, imports included" if self.allocated_bytes is None else "CUDA allocator, allocated"


def measure_peak(device: torch.device) -> Peak:
    """This process's peak so far, with a rank on `device`."""
    process = read_status("VmHWM")  # not getrusage, whose peak begins with that of the process that started this one
    if device.type != "cuda":
        return Peak(process_bytes=process)
    return Peak(
        process_bytes=process,
        allocated_bytes=torch.cuda.max_memory_allocated(device),
        reserved_bytes=torch.cuda.max_memory_reserved(device),
        retries=torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
        device_bytes=measure_device(device),
    )


def measure_device(device: torch.device) -> int | None:
    """Bytes in use on a CUDA device as NVML sees it; None where NVML does not answer (WSL, some containers)."""
    try:
        return torch.cuda.device_memory_used(device)
    except Exception:  # of pynvml's own classes, or PyTorch's own words for a driver that is not there
        return None


def measure_peaks(device: torch.device) -> list[Peak]:
    """`measure_peak` of every rank, in their order. Every rank must call it."""
    own = measure_peak(device)
    if not dist.is_initialized():
        return [own]
    values = torch.tensor([-1 if value is None else value for value in astuple(own)], device=device)
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    return [build_peak([None if value < 0 else value for value in rank.tolist()]) for rank in everyone]


def build_peak(counters: list[Any]) -> Peak:
    """From the counters in the order of the fields."""
    return Peak(*counters)


def greatest(peaks: Iterable[Peak]) -> Peak:
    """The maximum over ranks, of each counter by itself."""
    counters = zip(*(astuple(peak) for peak in peaks), strict=True)
    return build_peak([max((value for value in counter if value is not None), default=None) for counter in counters])


def measure_free(device: torch.device) -> int:
    """Bytes that this process could still take: on CUDA also what PyTorch keeps cached, on the CPU also under its
    limit on data (RLIMIT_DATA), if there is one."""
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device.index) * total)
        return min(free + torch.cuda.memory_reserved(device), allowed) - allocated
    status = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(status["MemAvailable"].split()[0]) * 1024
    limit = measure_limit()
    return free if limit is None else min(free, max(limit - measure_data(), 0))


class MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    ]  # fmt: skip


def measure_holes() -> int:
    """Bytes that were freed and that glibc's malloc keeps in its heaps: the process's, and nobody's. 0 elsewhere."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = MallocInfo
    return int(mallinfo().fordblks)


def measure_limit() -> int | None:
    """Bytes that RLIMIT_DATA lets this process have; None where it sets no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if limit == resource.RLIM_INFINITY else limit


def measure_data() -> int:
    """Bytes of this process that count towards RLIMIT_DATA."""
    return read_status("VmData")


def read_status(name: str) -> int:
    """Bytes of one of Linux's counters of this process (proc(5))."""
    own = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(own[name].split()[0]) * 1024


def least_over_ranks(value: int, device: torch.device) -> int:
    """The smallest of all ranks' values. Every rank must call it."""
    if not dist.is_initialized():
        return value
    least = torch.tensor(value, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


@dataclass
class Allocations:
    """What PyTorch's CPU allocator handed out and took back while this was counted, on the thread that counted."""

    peak_bytes: int = 0
    """Most that was live at once, of what was allocated since."""
    left_bytes: int = 0
    """Still live at the end."""
    peak_operator: str = ""
    """The innermost operator that ran at the peak, where operators are recorded."""
    live: list[tuple[int, int]] = field(default_factory=list)
    """(time in ns, bytes live from then on) for each time that something was allocated or freed."""

    def live_at(self, time_ns: int) -> int:
        """Bytes that were live at this time."""
        place = bisect.bisect_right(self.live, time_ns, key=lambda event: event[0])
        return self.live[place - 1][1] if place else 0

    def peak_between(self, first_ns: int, last_ns: int) -> int:
        """Most bytes that were live at once between two times."""
        return max([self.live_at(first_ns), *(live for when, live in self.live if first_ns <= when <= last_ns)])


@contextmanager
def count_cpu_allocations(*, operators: bool = False) -> Iterator[Allocations]:
    """The allocator's own events, by PyTorch's profiler: exact, but blind to other threads. Filled at the end.

    `operators` also finds the one that ran at the peak; their records take memory beside what is counted.
    """
    found = Allocations()
    gc.collect()  # else what others left behind would be seen to go, and never have come
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch._C._autograd._enable_record_function(operators)
        try:
            yield found
        finally:
            torch._C._autograd._enable_record_function(True)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = 0
    for event in events:
        if event.name() == "[memory]" and event.device_type() == torch._C._autograd.DeviceType.CPU:
            found.left_bytes += event.nbytes()
            found.live.append((event.start_ns(), found.left_bytes))
            if found.left_bytes > found.peak_bytes:
                found.peak_bytes, now = found.left_bytes, event.start_ns()
    for event in events:  # the last to begin before the peak and to end after it is the innermost
        if event.name() != "[memory]" and event.start_ns() <= now <= event.start_ns() + event.duration_ns():
            found.peak_operator = event.name()
