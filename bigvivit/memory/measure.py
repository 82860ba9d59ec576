"""What memory was really used, and by whose count."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist


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


def measure_peak_over_ranks(device: torch.device) -> Peak:
    """The maximum of `measure_peak` over ranks. Every rank must call it."""
    peak = measure_peak(device)
    if not dist.is_initialized():
        return peak
    value = torch.tensor(peak.peak_bytes, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return Peak(int(value), peak.how)
