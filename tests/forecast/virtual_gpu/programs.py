"""What the tests run in child processes on virtual GPUs. Importing this imports no torch."""

from __future__ import annotations

import os
import random
from typing import Any, NamedTuple

MiB = 1024**2
Operation = tuple[str, int, int, int]
"""(a, number of the block, bytes, stream) or (f, number, 0, 0)."""
ACTIONS = {"segment_alloc": "S", "segment_free": "s", "segment_map": "M", "segment_unmap": "U"}


class Recorded(NamedTuple):
    addresses: list[int | None]
    """Of every allocation, in order; None where memory was out."""
    segments: list[tuple[str, int, int]]
    """(kind, address, bytes) as the allocator asked for them."""
    allocated: int
    reserved: int
    peak_reserved: int
    flushes: int


def random_program(seed: int, count: int, *, streams: int = 1, largest: int = 64 * MiB) -> list[Operation]:
    """Allocations and frees, sizes as in training: many equal ones, from bytes to many megabytes."""
    rng = random.Random(seed)
    usual = [round(2 ** rng.uniform(4, rng.choice((12, 20, 26)))) for _ in range(40)]
    usual = [min(size, largest) for size in usual]
    operations: list[Operation] = []
    live: list[int] = []
    for number in range(count):
        grows = 0.75 if number // 200 % 2 == 0 else 0.35  # phases, as forward and backward
        if live and rng.random() > grows:
            place = rng.choice((len(live) - 1, rng.randrange(len(live))))
            operations.append(("f", live.pop(place), 0, 0))
        else:
            size = rng.choice(usual) if rng.random() < 0.8 else round(2 ** rng.uniform(4, 25))
            operations.append(("a", number, size, rng.randrange(streams)))
            live.append(number)
    return operations


def run_program(operations: list[Operation], conf: str, fraction: float) -> Recorded:
    """Run a program through PyTorch's allocator, fresh in this process, with these settings."""
    import torch

    os.environ["PYTORCH_ALLOC_CONF"] = conf
    if conf:
        torch._C._accelerator_setAllocatorSettings(conf)
    torch.cuda.init()
    if fraction < 1:
        torch.cuda.set_per_process_memory_fraction(fraction)
    torch.cuda.memory._record_memory_history(context=None, stacks="python", max_entries=10**6)
    made = [torch.cuda.current_stream()] + [torch.cuda.Stream() for _ in range(3)]
    blocks: dict[int, int] = {}
    addresses: list[int | None] = []
    for kind, number, size, stream in operations:
        if kind == "a":
            try:
                blocks[number] = torch.cuda.caching_allocator_alloc(size, 0, made[stream])
                addresses.append(blocks[number])
            except torch.cuda.OutOfMemoryError:
                addresses.append(None)
        elif number in blocks:
            torch.cuda.caching_allocator_delete(blocks.pop(number))
    stats = torch.cuda.memory_stats()
    snapshot: Any = torch.cuda.memory._snapshot()
    events = [event for event in snapshot["device_traces"][0] if event["action"] in ACTIONS]
    return Recorded(
        addresses,
        [(ACTIONS[event["action"]], event["addr"], event["size"]) for event in events],
        stats["allocated_bytes.all.current"],
        stats["reserved_bytes.all.current"],
        stats["reserved_bytes.all.peak"],
        stats["num_alloc_retries"],
    )
