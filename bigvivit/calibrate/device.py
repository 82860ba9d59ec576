"""What the worker reads of its device, and a recording of PyTorch's allocator. Everything here runs in the worker."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigvivit.assemble import choose_device
from bigvivit.config import ConfigError
from bigvivit.forecast.virtual_gpu import is_active
from bigvivit.memory.load import Fill
from bigvivit.memory.measure import measure_device
from bigvivit.model.weights import refill_buffers

MOST_EVENTS = 600_000
"""Of one recording."""
NOISE = 1 << 22
"""Values from which towers get their weights."""


def identify(name: str) -> dict[str, Any]:
    """What rows are of: they belong together where all of this is the same. Raises ConfigError for CUDA where there is
    none."""
    from bigvivit.machine import count_cores, read_memory, read_nvml
    from bigvivit.training.report import VIRTUAL, describe_device

    device = choose_device(name)
    found: dict[str, Any] = {
        "device": device.type,
        "card": describe_device(device).removesuffix(VIRTUAL),  # `evidence` says it
        "evidence": "virtual" if is_active() and device.type == "cuda" else "measured",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "driver": read_nvml()["driver"] if device.type == "cuda" else None,
        "capability": None,
        "memory_bytes": read_memory()["total_bytes"],
        "cores": count_cores(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"capability": 10 * card.major + card.minor, "memory_bytes": card.total_memory}
    return found


def cuda() -> torch.device:
    """The device of a worker on a GPU, fp32 products exact as training has them."""
    return choose_device("cuda")


def synchronize(device: torch.device) -> None:
    """Wait for what was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clear() -> None:
    """Nothing cached, nothing counted: as at the start of a process, cuBLAS' workspaces given back too."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()


def outside_bytes() -> int | None:
    """In use on the device by this process beside PyTorch's allocator, by NVML; None where it does not tell processes
    apart (some containers): the driver's own count has other programs in it."""
    own = process_bytes()
    return None if own is None else own - torch.cuda.memory_reserved()


def process_bytes() -> int | None:
    """In use on the device by this process, by NVML; None where it does not answer or does not know the process."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode())
        processes = {each.pid: each.usedGpuMemory for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    except pynvml.NVMLError:
        return None
    return processes.get(os.getpid())


def used_bytes() -> int | None:
    """In use on the whole device by NVML, which needs no context; None where it does not answer."""
    return measure_device(torch.device("cuda", 0))


def start_recording() -> None:
    """Every allocation from now on, with the lines of Python that asked for it."""
    torch.cuda.memory._record_memory_history(
        "all", context="alloc", stacks="python", max_entries=MOST_EVENTS, clear_history=True
    )


def stop_recording(path: Path) -> None:
    """Write the recording, as PyTorch does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(None)


def replay(path: Path) -> dict[str, Any]:
    """What the allocator model makes of a recording, or why nothing."""
    from importlib.metadata import version

    from bigvivit.forecast.replay import compare
    from bigvivit.forecast.segments import oldest_segment_first
    from bigvivit.forecast.snapshot import read_trace

    try:
        found = compare(read_trace(path), oldest_segment_first=oldest_segment_first(version("torch")))
    except ConfigError as error:
        return {"replay": str(error)}
    return {
        "replay": "exact" if found.exact and found.blocks_matching == found.blocks else "differs",
        "replayed_blocks": found.blocks,
        "replayed_blocks_matching": found.blocks_matching,
        "replayed_segment_events": found.segment_events,
        "replayed_segment_events_matching": found.segment_events_matching,
        "replayed_reserved_bytes": found.run.peak_reserved_bytes,
    }


def quick_fill() -> Fill:
    """Weights of a tower in a moment, where drawing them as training does takes a giant tower many seconds: the same
    small noise again and again. Memory and time depend on their shapes, and on that they are numbers."""
    noise = 0.02 * torch.randn(NOISE)

    @torch.no_grad()
    def fill(name: str, piece: nn.Module) -> None:
        refill_buffers(piece)
        for key, parameter in piece.named_parameters():
            flat = parameter.view(-1)
            if "norm" in key and key.endswith("weight"):
                flat.fill_(1.0)
                continue
            for part in flat.split(NOISE):
                part.copy_(noise[: len(part)])

    return fill


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of so many calls after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
