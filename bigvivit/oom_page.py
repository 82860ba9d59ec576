"""The page that a training ends with when memory runs out: what was measured, what the step needs, what would fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from bigvivit.advice import Room, ask_for_advice
from bigvivit.memory.apply import autocast_dtype, compute_dtype
from bigvivit.memory.freeze import dtype_name
from bigvivit.memory.out_of_memory import Shortage
from bigvivit.trial import Trial
from bigvivit.units import format_bytes

if TYPE_CHECKING:
    from bigvivit.train import Job


def write_page(job: Job, shortage: Shortage, device: torch.device) -> str:
    """The whole page, several lines. Takes as long as a few traces of the step: seconds, for a giant tower a minute."""
    lines = [
        f"out of memory on rank {job.rank} of {job.world}: {shortage.message}",
        "measured:",
        *(f"  {line}" for line in describe_shortage(shortage, device)),
    ]
    trial = describe_step(job, device)
    lines += ask_for_advice(trial, Room(shortage.usable_bytes, cuda=device.type == "cuda"))
    return "\n".join(lines)


def describe_shortage(shortage: Shortage, device: torch.device) -> list[str]:
    """What the counters said."""
    held = shortage.held
    entries = [("it failed in", shortage.where)] if shortage.where else []
    if held.allocated_bytes is not None and held.reserved_bytes is not None:
        retries = f"; {held.retries} times the whole cache was given back" if held.retries else ""
        reserved = f"{format_bytes(held.reserved_bytes)} reserved for them (CUDA allocator){retries}"
        entries.append(("tensors at their peak", f"{format_bytes(held.allocated_bytes)}, {reserved}"))
        if held.device_bytes is not None:
            entries.append(("whole device", f"{format_bytes(held.device_bytes)}, other programs included (NVML)"))
    else:
        holes = f"and {format_bytes(shortage.holes_bytes)} free between them, in pieces (malloc)"
        entries.append(("tensors when it failed", f"{format_bytes(shortage.tensors_bytes)}, {holes}"))
    entries.append(("process at its peak", f"{format_bytes(held.process_bytes)} resident"))
    if shortage.limit_bytes is not None:
        beside = format_bytes(shortage.limit_bytes - shortage.room_bytes)
        limit = f"of the limit of {format_bytes(shortage.limit_bytes)} (RLIMIT_DATA)"
        entries.append(("beside tensors", f"{beside} {limit}: imports and libraries"))
    entries.append(("room for tensors", f"{format_bytes(shortage.room_bytes)}, with the training let go"))
    if shortage.usable_bytes != shortage.room_bytes:
        entries.append(("less holes between them", f"{format_bytes(shortage.usable_bytes)}"))
    return [f"{name:<24} {value}" for name, value in entries]


def describe_step(job: Job, device: torch.device) -> Trial:
    """The run's own step, with types as this device chooses them."""
    config, plan = job.config, job.config.memory
    assert config.model.tower is not None
    assert config.model.tubelet is not None
    assert config.model.temporal_depth is not None
    assert config.model.temporal_input is not None
    types = {"compute": dtype_name(compute_dtype(plan, device)), "autocast": dtype_name(autocast_dtype(plan, device))}
    return Trial(
        stage=config.stage,
        tower=config.model.tower,
        frames=config.clip.frames,
        size=config.clip.size,
        tubelet=config.model.tubelet,
        temporal_depth=config.model.temporal_depth,
        temporal_input=config.model.temporal_input,
        patch_grid=config.model.patch_grid,
        droplayer=config.model.droplayer,
        clips=job.micro_batch,
        accumulate=config.optim.accumulate,
        classes=len(job.manifest.classes),
        optimizer=config.optim.name,
        fused=config.optim.fused,
        ema=config.optim.ema,
        plan=replace(plan, **types),  # type: ignore[arg-type]
        fsdp=config.fsdp,
        ds=job.ds,
        world=job.world,
        depths=tuple(head.depth for head in config.probe.heads(config.optim, config.model)),
    )
