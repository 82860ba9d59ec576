"""Rows about memory: a trial's real steps on the device, the same on a virtual card and in a trace; and capacities."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bigvivit.calibrate.device import clear, cuda, outside_bytes, quick_fill, replay, start_recording, stop_recording
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.alloc_conf import AllocatorSettings
from bigvivit.forecast.allocator import Allocator
from bigvivit.forecast.capacity import find_capacity
from bigvivit.forecast.card import THREADS, allocator_events, judge
from bigvivit.forecast.hardware import accelerator_by_hand, find_accelerator
from bigvivit.forecast.overhead import cublas_workspace
from bigvivit.forecast.segments import oldest_segment_first
from bigvivit.forecast.simulate import simulate
from bigvivit.forecast.trace import STEPS, repeat_batch
from bigvivit.forecast.virtual_gpu import is_active
from bigvivit.memory.out_of_memory import is_out_of_memory, let_go
from bigvivit.training.step import train_step
from bigvivit.trial import Trial, build_trial, import_early, trace_trial
from bigvivit.units import GiB

FEW, MANY = 8, 32
"""Frames at which a forecast of a capacity is traced first."""
PROBE_STEPS = 2
"""Of a capacity: the optimizer's state is there from the first on."""


def row_of(card: str, capability: int | None, memory_bytes: int) -> Accelerator:
    """The table's row of a device, or, where there is none, what is known of it."""
    from bigvivit.config import ConfigError

    try:
        return find_accelerator(card)
    except ConfigError:
        return replace(accelerator_by_hand(memory_bytes, capability), name=card)


def take_steps(trial: Trial, device: torch.device, steps: int) -> list[float]:
    """Build and train; seconds of each step. On a virtual GPU weights have no values, and need none."""
    virtual = is_active()
    engine, batch = build_trial(trial, device, fake=virtual, fill=None if virtual else quick_fill())
    batches, seconds = repeat_batch(batch, trial.accumulate), []
    for _ in range(steps):
        start = time.perf_counter()
        float(train_step(engine, batches).loss)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def run_on_gpu(trial: str, recording: str | None) -> dict[str, Any]:
    """Three steps, loading included: what PyTorch's allocator says, and what the allocator model makes of the
    recording of it, which is kept there."""
    own = Trial.from_json(trial)
    import_early(own)
    device = cuda()
    clear()
    if recording is not None:
        start_recording()
    seconds = take_steps(own, device, STEPS)
    stats = torch.cuda.memory_stats()
    found: dict[str, Any] = {
        "allocated_bytes": int(stats["allocated_bytes.all.peak"]),
        "reserved_bytes": int(stats["reserved_bytes.all.peak"]),
        "requested_bytes": int(stats["requested_bytes.all.peak"]),
        "retries": int(stats["num_alloc_retries"]),
        "outside_bytes": outside_bytes(),
        "seconds_per_step": min(seconds),
    }
    if recording is not None:
        stop_recording(Path(recording))
        found |= replay(Path(recording))
    return found


def run_on_cpu(trial: str) -> dict[str, Any]:
    """Three steps by the CPU allocator's own count."""
    from bigvivit.trial_run import measure_trial

    start = time.perf_counter()
    peak = measure_trial(Trial.from_json(trial), STEPS)
    return {"allocated_bytes": peak, "seconds_per_step": (time.perf_counter() - start) / STEPS}


def forecast_on_gpu(trial: str, card: str, capability: int | None, memory_bytes: int) -> dict[str, Any]:
    """The same by a trace and the allocator model, on the card as the tables have it."""
    row = row_of(card, capability, memory_bytes)
    trace = trace_trial(Trial.from_json(trial), free_bytes=GiB, host=True, card=row)
    run = judge(trace, row, ranks=1).runs[2]
    if run.out_of_memory is not None:
        return {"failed": f"the forecast does not fit: {run.out_of_memory}"}
    return {"allocated_bytes": run.peak_allocated_bytes, "reserved_bytes": run.peak_reserved_bytes}


def forecast_on_cpu(trial: str) -> dict[str, Any]:
    """By a trace."""
    return {"allocated_bytes": trace_trial(Trial.from_json(trial), free_bytes=GiB).peak_bytes()}


def find_frames(trial: str, limit_bytes: int, most: int, guess: int | None) -> dict[str, Any]:
    """The most frames whose steps PyTorch's allocator lets pass when it may have so many bytes only."""
    own, device = Trial.from_json(trial), cuda()
    total = torch.cuda.mem_get_info()[1]
    seconds: dict[int, float] = {}

    def fits(frames: int) -> bool:
        start = time.perf_counter()
        clear()
        failure: Exception | None = None
        try:
            take_steps(replace(own, frames=frames), device, PROBE_STEPS)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        if failure is not None:
            let_go(failure, device)
        seconds[frames] = time.perf_counter() - start
        return failure is None

    if limit_bytes >= total:
        return {"failed": f"the card has {total} B: nothing to emulate"}
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total)
    try:
        found = find_capacity(fits, unit=own.tubelet, most=most, guess=guess)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "frames": found.frames,
        "beyond": found.beyond,
        "probes": len(seconds),
        "longest_probe_seconds": max(seconds.values()),
    }


def forecast_frames(
    trial: str, limit_bytes: int, most: int, card: str, capability: int | None, memory_bytes: int
) -> dict[str, Any]:
    """The same by traces and the allocator model."""
    own, row = Trial.from_json(trial), row_of(card, capability, memory_bytes)
    workspace = cublas_workspace(row).expected_bytes
    peaks: dict[int, int] = {}

    def fits(frames: int) -> bool:
        trace = trace_trial(replace(own, frames=frames), free_bytes=limit_bytes, host=True, card=row, steps=PROBE_STEPS)
        peaks[frames] = trace.peak_bytes()
        allocator = Allocator(
            AllocatorSettings(),
            capacity_bytes=limit_bytes,
            oldest_segment_first=oldest_segment_first(version("torch")),
        )
        start = [("a", -1 - thread, workspace, 0) for thread in range(THREADS)]
        return simulate([*start, *allocator_events(trace)], allocator).out_of_memory is None

    for frames in (FEW, MANY):
        fits(frames)
    slope = max((peaks[MANY] - peaks[FEW]) / (MANY - FEW), 1)
    guess = MANY + int((limit_bytes - THREADS * workspace - peaks[MANY]) / slope)
    found = find_capacity(fits, unit=own.tubelet, most=most, guess=max(own.tubelet, min(guess, most)))
    return {"frames": found.frames, "beyond": found.beyond}
