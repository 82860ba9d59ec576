"""Random programs through PyTorch's own allocator on a virtual GPU, and through our model of it."""

from __future__ import annotations

import ctypes
import gc
import os
import random
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

from bigvivit.forecast.alloc_conf import AllocatorSettings, parse_conf
from bigvivit.forecast.allocator import Allocator
from bigvivit.forecast.blocks import Block
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import context
from bigvivit.forecast.segments import OutOfMemory, oldest_segment_first
from bigvivit.forecast.virtual_gpu import virtual_gpu
from bigvivit.units import MiB

Operation = tuple[str, int, int, int]
"""(a, number of the block, bytes, stream), (f, number, 0, 0), (u, number, 0, stream): another stream uses the block
too, (h, 1 or 0, 0, 0): from here on events wait, or are complete, (e, 0, 0, 0): the cache is emptied."""
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


def random_program(
    seed: int, count: int, *, streams: int = 1, largest: int = 64 * MiB, defers: bool = False
) -> list[Operation]:
    """Allocations and frees, sizes as in training: many equal ones, from bytes to many megabytes. `defers`: some blocks
    are used by other streams too, whose work takes its time, and the cache is emptied now and then."""
    rng = random.Random(seed)
    usual = [round(2 ** rng.uniform(4, rng.choice((12, 20, 26)))) for _ in range(40)]
    usual = [min(size, largest) for size in usual]
    operations: list[Operation] = []
    live: list[int] = []
    for number in range(count):
        if defers and rng.random() < 0.2:
            what = rng.random()
            if live and what < 0.9:
                operations.append(("u", rng.choice(live), 0, rng.randrange(streams)))
            else:
                operations.append(("h", rng.randrange(2), 0, 0) if what < 0.995 else ("e", 0, 0, 0))
            continue
        grows = 0.75 if number // 200 % 2 == 0 else 0.35  # phases, as forward and backward
        if live and rng.random() > grows:
            place = rng.choice((len(live) - 1, rng.randrange(len(live))))
            operations.append(("f", live.pop(place), 0, 0))
        else:
            size = rng.choice(usual) if rng.random() < 0.8 else round(2 ** rng.uniform(4, 25))
            operations.append(("a", number, size, rng.randrange(streams)))
            live.append(number)
    return operations


def run_program(
    operations: list[Operation], conf: str, fraction: float, start: int = 0, snapshot: str | None = None
) -> Recorded:
    """Run a program through PyTorch's allocator, fresh in this process, with these settings. It is recorded from the
    operation `start` on, and the recording written to the file `snapshot`."""
    import torch

    library = ctypes.CDLL(None)
    os.environ["PYTORCH_ALLOC_CONF"] = conf
    if conf:
        torch._C._accelerator_setAllocatorSettings(conf)
    torch.cuda.init()
    if fraction < 1:
        torch.cuda.set_per_process_memory_fraction(fraction)
    made = [torch.cuda.current_stream()] + [torch.cuda.Stream() for _ in range(3)]
    blocks: dict[int, torch.Tensor] = {}
    addresses: list[int | None] = []
    for place, (kind, number, size, stream) in enumerate(operations):
        if place == start:
            torch.cuda.memory._record_memory_history(context=None, stacks="python", max_entries=10**6)
        if kind == "a":
            try:
                with torch.cuda.stream(made[stream]):
                    blocks[number] = torch.empty(size, dtype=torch.uint8, device="cuda")
                addresses.append(blocks[number].data_ptr())
            except torch.cuda.OutOfMemoryError:
                addresses.append(None)
        elif kind == "h":
            library.bigvivit_virtual_gpu_hold_events(number)
        elif kind == "e":
            torch.cuda.empty_cache()
        elif number in blocks and kind == "u":
            blocks[number].record_stream(made[stream])
        elif number in blocks:
            del blocks[number]
    if snapshot is not None:
        torch.cuda.memory._dump_snapshot(snapshot)
    stats = torch.cuda.memory_stats()
    history: Any = torch.cuda.memory._snapshot()
    events = [event for event in history["device_traces"][0] if event["action"] in ACTIONS]
    return Recorded(
        addresses,
        [(ACTIONS[event["action"]], event["addr"], event["size"]) for event in events],
        stats["allocated_bytes.all.current"],
        stats["reserved_bytes.all.current"],
        stats["reserved_bytes.all.peak"],
        stats["num_alloc_retries"],
    )


def next_address(recorded: Recorded, allocator: Allocator) -> int:
    """The address that the driver gave next: of the segment, or of the first pages of a new range of expandable ones.
    The driver gives a range's addresses again once it is gone, but none that is still there."""
    kinds = "M" if allocator.settings.expandable_segments else "S"
    address = next(event[1] for event in recorded.segments[len(allocator.log) :] if event[0] in kinds)
    ranges = {(each.address, each.size) for block in allocator.blocks() if (each := block.expandable) is not None}
    assert not any(start <= address < start + size for start, size in ranges), "PyTorch asked for no new range here"
    return address


def model_program(
    operations: list[Operation], recorded: Recorded, settings: AllocatorSettings, memory: int
) -> Recorded:
    """The program through our model."""
    taken = context(find_accelerator("A100 80GB")).expected_bytes
    allocator = Allocator(
        settings,
        capacity_bytes=memory - taken,
        device_bytes=memory,
        reserve=lambda size: next_address(recorded, allocator),
        oldest_segment_first=oldest_segment_first(version("torch")),
    )
    blocks: dict[int, Block] = {}
    addresses: list[int | None] = []
    held = 0
    for kind, number, size, stream in operations:
        if kind == "h":
            held = number
        elif kind == "e":
            allocator.empty_cache()
        elif kind == "u" and number in blocks:
            allocator.record_stream(blocks[number], stream)
        elif kind == "f" and number in blocks:
            allocator.free(blocks.pop(number))
        if kind != "a":
            continue
        if not held:  # what was freed before is noticed by the next request
            for other in range(4):
                allocator.synchronize(other)
        try:
            blocks[number] = allocator.malloc(size, stream)
            addresses.append(blocks[number].address)
        except OutOfMemory:
            addresses.append(None)
    return Recorded(
        addresses,
        [(event.kind, event.address, event.size) for event in allocator.log],
        allocator.allocated_bytes,
        allocator.reserved_bytes,
        allocator.peak_reserved_bytes,
        allocator.flushes,
    )


def run_both(
    conf: str, fraction: float, memory: int, seed: int, *, defers: bool = False, count: int = 3000
) -> tuple[Recorded, Recorded]:
    """A random program of `count` operations on a card with `memory` bytes: PyTorch's answer and the model's."""
    operations = random_program(seed, count, streams=2, defers=defers)
    with virtual_gpu("A100 80GB", memory_bytes=memory) as gpu:
        recorded = gpu.call(run_program, operations, conf, fraction)
    settings = replace(parse_conf(conf) if conf else AllocatorSettings(), per_process_memory_fraction=fraction)
    return recorded, model_program(operations, recorded, settings, memory)


def record_graphs(conf: str, snapshot: str) -> None:
    """Three CUDA graphs are captured, one of them goes, and what it had is given back."""
    import torch

    if conf:
        torch._C._accelerator_setAllocatorSettings(conf)
    torch.cuda.memory._record_memory_history(context=None, stacks="python", max_entries=10**6)
    kept = [torch.empty(3 * MiB, dtype=torch.uint8, device="cuda") for _ in range(5)]
    x, made = torch.zeros(1024, 1024, device="cuda"), []
    for count in (4, 12, 8):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x
            for number in range(count):
                y = torch.tanh(y) * y
                torch.empty((number + 1) * 777_777, dtype=torch.uint8, device="cuda")
        made.append((graph, y))
    del kept[::2], graph, y
    torch.cuda.empty_cache()
    made.pop(1)
    gc.collect()
    torch.cuda.empty_cache()
    kept += [torch.empty(30 * MiB, dtype=torch.uint8, device="cuda") for _ in range(3)]
    for graph, _ in made:
        graph.replay()
    torch.cuda.memory._dump_snapshot(snapshot)
