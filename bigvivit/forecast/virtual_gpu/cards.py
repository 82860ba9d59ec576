"""The accelerator that a virtual GPU shows: a row of the table, and what its compute capability fixes."""

from __future__ import annotations

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import ACCELERATORS, Accelerator
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import context, nccl
from bigvivit.units import KiB, format_bytes

MAX_GPUS = 64
PER_CAPABILITY = {  # shared memory of a multiprocessor (KiB), threads, blocks
    70: (96, 2048, 32),
    75: (64, 1024, 16),
    80: (164, 2048, 32),
    86: (100, 1536, 16),
    89: (100, 1536, 24),
    90: (228, 2048, 32),
    100: (228, 2048, 32),
    120: (100, 1536, 24),
}
"""Technical specifications per compute capability, CUDA C++ Programming Guide."""


def find_card(gpu: str, memory_bytes: int | None = None) -> Accelerator:
    """The row of a name that can be a virtual GPU. Raises ConfigError for others, and for a memory that cannot be."""
    row = find_accelerator(gpu)
    if row.device is None or row.capability not in PER_CAPABILITY:
        known = ", ".join(each.name for each in ACCELERATORS if each.device is not None)
        raise ConfigError(f"gpu={gpu!r} cannot be a virtual GPU, which is NVIDIA's: choose one of {known}")
    least = context(row).expected_bytes
    if memory_bytes is not None and memory_bytes <= least:
        raise ConfigError(
            f"memory_bytes={memory_bytes} must be above the {format_bytes(least)} that a CUDA context takes"
        )
    return row


def describe(gpu: str, gpus: int, memory_bytes: int | None, context_bytes: int | None = None) -> str:
    """The value of BIGVIVIT_VIRTUAL_GPU: fields as csrc/device.c reads them, joined by semicolons."""
    if not 1 <= gpus <= MAX_GPUS:
        raise ConfigError(f"gpus={gpus} must be 1 to {MAX_GPUS}, what one node holds")
    row = find_card(gpu, memory_bytes)
    assert row.device is not None
    assert row.capability is not None
    shared, threads, blocks = PER_CAPABILITY[row.capability]
    fields = {
        "name": row.device.name,
        "gpus": gpus,
        "memory": memory_bytes or row.memory_bytes,
        "context": context(row).expected_bytes if context_bytes is None else context_bytes,
        "communicator": nccl(row, 1).expected_bytes,
        "capability": row.capability,
        "multiprocessors": row.device.multiprocessors,
        "l2": row.device.l2_bytes,
        "shared_per_multiprocessor": shared * KiB,
        "shared_per_block": (shared - (row.capability >= 80)) * KiB,
        "threads_per_multiprocessor": threads,
        "blocks_per_multiprocessor": blocks,
    }
    return ";".join(f"{key}={value}" for key, value in fields.items())
