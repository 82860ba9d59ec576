"""Run a program's allocations through the allocator model: a recorded program, or a forecast's stream of events."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bigvivit.forecast.alloc_conf import AllocatorSettings
from bigvivit.forecast.allocator import Allocator
from bigvivit.forecast.blocks import Block
from bigvivit.forecast.segments import OutOfMemory


@dataclass
class Run:
    """What a program took. All in bytes; fragmentation is what the allocator held and the program did not."""

    settings: AllocatorSettings
    peak_allocated_bytes: int = 0
    """Blocks in use at once, at most: rounded requests."""
    peak_reserved_bytes: int = 0
    """Asked of the device at once, at most."""
    allocated_at_peak_bytes: int = 0
    """Blocks in use when what was reserved was most: of several such moments, at the fullest."""
    requested_at_peak_bytes: int = 0
    """Of these, what the program had asked for."""
    flushes: int = 0
    """Times the device had no room and everything cached was given back."""
    failed: int = 0
    """Allocations that failed when they were recorded too; the program went on without them."""
    out_of_memory: OutOfMemory | None = None
    """The request that could not be met; the run ends there."""
    out_of_memory_event: int | None = None
    """Its place in the stream of events."""

    @property
    def fragmentation_bytes(self) -> int:
        """What was reserved at the peak and used by nothing."""
        return self.peak_reserved_bytes - self.allocated_at_peak_bytes

    @property
    def fragmentation_cost_bytes(self) -> int:
        """Peak reserved less peak allocated: what perfect packing would have saved."""
        return self.peak_reserved_bytes - self.peak_allocated_bytes


def simulate(
    events: Iterable[tuple[str, int, int, int]],
    allocator: Allocator,
    blocks: dict[int, Block] | None = None,
    placed: Callable[[int, Block], None] | None = None,
) -> Run:
    """Run `(kind, id, size, stream)` events to their end or to the first request that cannot be met.

    Kinds: a allocate `size` bytes under `id` (0 bytes take nothing); f free `id`; u the block `id` is used on `stream`
    too (record_stream); y the work given to `stream` is done; e empty the cache; g the graphs of
    the private pool `stream` are gone; o an allocation the program survives
    failing. `blocks` are those there before, by id; `placed(id, block)` sees each allocation. An id that is freed or
    used without being there is a KeyError: the caller's stream of events is wrong.
    """
    blocks = {} if blocks is None else blocks
    empty: set[int] = set()
    run = Run(allocator.settings)
    malloc, free = allocator.malloc, allocator.free
    most, fullest, index = allocator.reserved_bytes, allocator.allocated_bytes, -1
    run.allocated_at_peak_bytes, run.requested_at_peak_bytes = fullest, allocator.requested_bytes
    try:
        for kind, name, size, stream in events:
            index += 1
            if kind == "a":
                if size:
                    blocks[name] = block = malloc(size, stream)
                    if placed is not None:
                        placed(name, block)
                    if allocator.reserved_bytes > most or (
                        allocator.allocated_bytes > fullest and allocator.reserved_bytes == most
                    ):
                        most, fullest = allocator.reserved_bytes, allocator.allocated_bytes
                        run.allocated_at_peak_bytes = fullest
                        run.requested_at_peak_bytes = allocator.requested_bytes
                else:
                    empty.add(name)
            elif kind == "f":
                if name in empty:
                    empty.discard(name)
                else:
                    free(blocks.pop(name))
            elif kind == "u":
                allocator.record_stream(blocks[name], stream)
            elif kind == "y":
                allocator.synchronize(stream)
            elif kind == "e":
                allocator.empty_cache()
            elif kind == "g":
                allocator.release_pool(stream)
            elif kind == "o":
                try:
                    free(malloc(size, stream))
                except OutOfMemory:
                    run.failed += 1
    except OutOfMemory as error:
        run.out_of_memory, run.out_of_memory_event = error, index
    run.peak_allocated_bytes = allocator.peak_allocated_bytes
    run.peak_reserved_bytes = allocator.peak_reserved_bytes
    run.flushes = allocator.flushes
    return run
