"""Run a program's allocations through the allocator model, and `bigvivit replay`: the same for a recorded trace.

`simulate` is for every caller: a recorded trace (the program in it, `program_of`), or a forecast's stream of events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.table import Table

from bigvivit.forecast.alloc_conf import AllocatorSettings
from bigvivit.forecast.allocator import (
    SMALL_REQUEST,
    SMALL_SEGMENT,
    Allocator,
    Block,
    OutOfMemory,
    SegmentEvent,
    descending_addresses,
)
from bigvivit.forecast.snapshot import Event, Trace
from bigvivit.units import MiB, format_bytes

WHAT_IFS = {
    "expandable_segments": AllocatorSettings(expandable_segments=True),
    "max_split_size": AllocatorSettings(max_split_bytes=128 * MiB),
    "roundup_power2_divisions": AllocatorSettings(roundup_power2_divisions=(8,) * 16),
}
"""Settings that a replay tries besides the recorded ones."""


@dataclass
class Run:
    """What a program took. All in bytes; fragmentation is what the allocator held and the program did not."""

    settings: AllocatorSettings
    peak_allocated_bytes: int = 0
    """Blocks in use at once, at most: rounded requests."""
    peak_reserved_bytes: int = 0
    """Asked of the device at once, at most."""
    allocated_at_peak_bytes: int = 0
    """Blocks in use when what was reserved was most."""
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
    too (record_stream); y the work given to `stream` is done; e empty the cache; o an allocation the program survives
    failing. `blocks` are those there before, by id; `placed(id, block)` sees each allocation. An id that is freed or
    used without being there is a KeyError: the caller's stream of events is wrong.
    """
    blocks = {} if blocks is None else blocks
    empty: set[int] = set()
    run = Run(allocator.settings)
    malloc, free = allocator.malloc, allocator.free
    most, index = -1, -1
    try:
        for kind, name, size, stream in events:
            index += 1
            if kind == "a":
                if size:
                    blocks[name] = block = malloc(size, stream)
                    if placed is not None:
                        placed(name, block)
                    if allocator.reserved_bytes > most:
                        most = allocator.reserved_bytes
                        run.allocated_at_peak_bytes = allocator.allocated_bytes
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


@dataclass(frozen=True)
class Comparison:
    """The model beside the recorded allocator."""

    run: Run
    capacity_bytes: int | None
    """Device memory the replay had: given, or read off the flushes and failures of the trace; None: no end."""
    capacity_is_inferred: bool
    segment_events: int
    """Recorded segments allocated and freed, pages mapped and unmapped."""
    segment_events_matching: int
    """How many the model got right from the first on: kind, address and size."""
    segment_events_extra: int
    """How many more the model has."""
    blocks: int
    """Recorded allocations."""
    blocks_matching: int
    """How many the model put at their recorded address."""
    recorded_peak_reserved_bytes: int

    @property
    def exact(self) -> bool:
        """Every segment in order, by address and size, and the same peak."""
        return (
            self.segment_events_matching == self.segment_events
            and not self.segment_events_extra
            and self.run.peak_reserved_bytes == self.recorded_peak_reserved_bytes
        )


def compare(trace: Trace, capacity_bytes: int | None = None) -> Comparison:
    """Replay a trace from its recorded initial state under its own settings, at the addresses the driver gave.

    The driver's addresses are taken from the trace as long as model and trace agree; after that from
    `descending_addresses`. Without a capacity, the one that the trace's own flushes need is used.
    """
    inferred, flushes = infer_capacity(trace)
    real = [SegmentEvent(*event) for event in trace.events if event.kind in "SsMU"]
    otherwise = descending_addresses()

    def reserve(size: int) -> int:
        upcoming = real[len(allocator.log)] if len(allocator.log) < len(real) else None
        return upcoming.address if upcoming is not None and upcoming.kind in "SM" else otherwise(size)

    capacity = capacity_bytes or inferred
    allocator = Allocator(trace.settings, capacity_bytes=capacity, reserve=reserve)
    blocks = restore(allocator, trace)
    matching = 0

    def placed(address: int, block: Block) -> None:
        nonlocal matching
        matching += block.address == address

    run = simulate(program_of(trace, flushes), allocator, blocks, placed)
    agree = next(
        (index for index, (ours, theirs) in enumerate(zip(allocator.log, real, strict=False)) if ours != theirs),
        min(len(allocator.log), len(real)),
    )
    return Comparison(
        run=run,
        capacity_bytes=capacity,
        capacity_is_inferred=capacity_bytes is None and inferred is not None,
        segment_events=len(real),
        segment_events_matching=agree,
        segment_events_extra=max(len(allocator.log) - len(real), 0),
        blocks=sum(event.kind == "a" for event in trace.events),
        blocks_matching=matching,
        recorded_peak_reserved_bytes=recorded_peak(trace),
    )


def what_if(trace: Trace, settings: AllocatorSettings, capacity_bytes: int | None) -> Run:
    """The trace's program under other settings, from an empty allocator: what was there before is allocated first."""
    before = [
        Event("a", address, requested or size, segment.stream)
        for segment in trace.initial
        for address, size, requested in segment.live
    ]
    allocator = Allocator(settings, capacity_bytes=capacity_bytes)
    return simulate([*before, *program_of(trace, infer_capacity(trace)[1])], allocator)


def restore(allocator: Allocator, trace: Trace) -> dict[int, Block]:
    """Install the trace's initial state. Expandable ranges of one stream and pool are one segment with gaps."""
    blocks: dict[int, Block] = {}
    growing: dict[tuple[int, bool], list[int]] = {}
    for index, segment in enumerate(trace.initial):
        if segment.expandable:
            growing.setdefault((segment.stream, segment.small), []).append(index)
        else:
            blocks |= allocator.adopt(
                segment.address, segment.size, small=segment.small, stream=segment.stream, live=segment.live
            )
    for (stream, small), indices in growing.items():
        parts = [trace.initial[index] for index in indices]  # by address
        ends = [part.address + part.size for part in parts]
        gaps = [(end, part.address - end) for end, part in zip(ends, parts[1:], strict=False)]
        blocks |= allocator.adopt(
            parts[0].address,
            ends[-1] - parts[0].address,
            small=small,
            stream=stream,
            live=[block for part in parts for block in part.live],
            expandable=True,
            unmapped=gaps,
        )
    return blocks


def program_of(trace: Trace, flushes: set[int]) -> list[Event]:
    """What the program did: its allocations and frees, without what the allocator made of them.

    A free that completed later waited for another stream, which is stood in for by one stream per block. `flushes` are
    the places where the program emptied the cache.
    """
    events, waiting, program = trace.events, set(), []
    for index, event in enumerate(events):
        kind, address, size, stream = event
        if index in flushes:
            program.append(Event("e", 0, 0, 0))
        if kind == "a":
            program.append(event)
        elif kind == "o":
            program.append(Event("o", 0, size, stream))
        elif kind == "r":
            following = events[index + 1] if index + 1 < len(events) else None
            if following is None or following[:2] != ("f", address):
                waiting.add(address)
                program.append(Event("u", address, 0, -1 - address))
            program.append(Event("f", address, 0, stream))
        elif kind == "f" and address in waiting:
            waiting.discard(address)
            program.append(Event("y", 0, 0, -1 - address))
        elif kind == "f" and (not index or events[index - 1][:2] != ("r", address)):
            program.append(Event("f", address, 0, stream))  # requested before the trace starts
    return program


def recorded_peak(trace: Trace) -> int:
    """Most bytes reserved at once, by the recorded events."""
    reserved = peak = sum(segment.size for segment in trace.initial)
    for kind, _, size, _ in trace.events:
        reserved += size if kind in "SM" else -size if kind in "sU" else 0
        peak = max(peak, reserved)
    return peak


def infer_capacity(trace: Trace) -> tuple[int | None, set[int]]:
    """The least device memory that explains the trace's flushes, and the places of those that it does not explain.

    Segments are given back either because the device was full when the next one was asked for, or because the program
    emptied the cache. It was full only if that next one would have gone beyond the peak and none of those given back
    could have served the request. The device's memory then lies between the peak and that sum. A failed request says
    how much was still free. None: no sign of an end.
    """
    peak = recorded_peak(trace)
    reserved, index, events = sum(segment.size for segment in trace.initial), 0, trace.events
    capacity, emptied = None, set()
    while index < len(events):
        kind, address, size, _ = events[index]
        if kind in "sU":
            start, before, released = index, reserved, set()
            while index < len(events) and events[index].kind in "sUf":
                if events[index].kind != "f":
                    reserved -= events[index].size
                    released.add((events[index].stream, events[index].size))
                index += 1
            asked, request = (*events[index : index + 2], None, None)[:2]
            if asked is None or (asked.kind != "o" and not was_full(asked, request, before, peak, released)):
                emptied.add(start)
            elif asked.kind != "o":
                capacity = max(peak, capacity or 0)
            continue
        if kind in "SM":
            reserved += size
        elif kind == "o":
            capacity = max(peak, reserved + address)
        index += 1
    return capacity, emptied


def was_full(asked: Event, request: Event | None, before: int, peak: int, released: set[tuple[int, int]]) -> bool:
    """Whether a full device explains that segments were given back before this one was asked for."""
    if asked.kind not in "SM" or before + asked.size <= peak:
        return False
    if asked.kind == "M" or request is None or request.kind != "a":
        return True
    small = request.size <= SMALL_REQUEST
    return not any(
        stream == request.stream and size >= request.size and small == (size == SMALL_SEGMENT)
        for stream, size in released
    )


def build_table(trace: Trace, comparison: Comparison, others: list[Run]) -> Table:
    """One row per settings; the first is the recorded run."""
    capacity = comparison.capacity_bytes
    table = Table(
        "settings",
        "peak allocated",
        "peak reserved",
        "cached at the peak",
        "fragmentation costs",
        "flushes",
        "out of memory",
        title=f"{trace.name}: {comparison.blocks} allocations",
        caption=f"device: {'no end' if capacity is None else format_bytes(capacity)}"
        + (" (read off the trace's flushes)" if comparison.capacity_is_inferred else ""),
    )
    for name, run in [("as recorded", comparison.run), *((run.settings.describe(), run) for run in others)]:
        table.add_row(
            name,
            format_bytes(run.peak_allocated_bytes),
            format_bytes(run.peak_reserved_bytes),
            format_bytes(run.fragmentation_bytes),
            format_bytes(run.fragmentation_cost_bytes),
            str(run.flushes),
            "no" if run.out_of_memory is None else f"at event {run.out_of_memory_event}",
        )
    return table
