"""A recorded trace through the allocator model: beside the recording, and its program under other settings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bigvivit.forecast.alloc_conf import AllocatorSettings
from bigvivit.forecast.allocator import Allocator
from bigvivit.forecast.blocks import Block
from bigvivit.forecast.recording import Event, Trace
from bigvivit.forecast.segments import PRIVATE, SMALL_REQUEST, SMALL_SEGMENT, SegmentEvent, descending_addresses
from bigvivit.forecast.simulate import Run, simulate


@dataclass(frozen=True)
class Comparison:
    """The model beside the recorded allocator."""

    run: Run
    flushes: Flushes
    emptied: frozenset[int]
    """Places of the events before which the program emptied the cache: the allocator had room for what came next."""
    segment_events: int
    """Recorded segments allocated and freed, pages mapped and unmapped."""
    segment_events_matching: int
    """How many the model got right from the first on: kind, address, size and stream."""
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


@dataclass(frozen=True)
class Flushes:
    """Why a recording gave segments back."""

    least_bytes: int | None
    """The least device memory that explains those for which the device was full; None where it never was."""
    beyond_bytes: int | None
    """The least that is too much for it."""


class Left(Exception):  # noqa: N818 - no error
    """The model put a block elsewhere than where it was."""


def compare(
    trace: Trace,
    capacity_bytes: int | None = None,
    *,
    oldest_segment_first: bool = False,
    to_the_end: bool = True,
) -> Comparison:
    """Replay a trace from its recorded initial state under its own settings, at the addresses the driver gave.

    The driver's addresses are taken from the trace as long as model and trace agree; after that from
    `descending_addresses`. The capacity is by default the least that explains the trace's flushes; it also says whether
    segments were given back because the allocator needed memory, or by the program. Where it is not to go `to_the_end`,
    the first block that lies elsewhere raises Left.
    """
    flushes = explain_flushes(trace)
    real = [SegmentEvent(*event) for event in trace.events if event.kind in "SsMU"]
    lowest = min([event.address for event in real] + [segment.address for segment in trace.initial], default=1 << 46)
    otherwise = descending_addresses(min(lowest, 1 << 46))  # below all that the driver gave: nothing is given twice
    agreed, agrees = 0, True

    def reserve(size: int) -> int:
        nonlocal agreed, agrees
        place = len(allocator.log)
        agrees = agrees and allocator.log[agreed:place] == real[agreed:place]
        agreed = place
        upcoming = real[place] if agrees and place < len(real) else None
        if upcoming is not None and (upcoming.kind == "M" or (upcoming.kind == "S" and upcoming.size == size)):
            return upcoming.address
        return otherwise(size)

    allocator = Allocator(
        trace.settings,
        capacity_bytes=capacity_bytes or flushes.least_bytes,
        reserve=reserve,
        oldest_segment_first=oldest_segment_first,
    )
    blocks = restore(allocator, trace)
    matching = 0

    def placed(address: int, block: Block) -> None:
        nonlocal matching
        matching += block.address == address
        if block.address != address and not to_the_end:
            raise Left

    emptied: set[int] = set()

    def needs_memory(place: int, request: Event) -> bool:
        needs = allocator.lacks_room(request.size, request.stream)
        if not needs:
            emptied.add(place)
        return needs

    run = simulate(program_of(trace, needs_memory), allocator, blocks, placed)
    agree = next(
        (index for index, (ours, theirs) in enumerate(zip(allocator.log, real, strict=False)) if ours != theirs),
        min(len(allocator.log), len(real)),
    )
    return Comparison(
        run=run,
        flushes=flushes,
        emptied=frozenset(emptied),
        segment_events=len(real),
        segment_events_matching=agree,
        segment_events_extra=max(len(allocator.log) - len(real), 0),
        blocks=sum(event.kind == "a" for event in trace.events),
        blocks_matching=matching,
        recorded_peak_reserved_bytes=recorded_peak(trace),
    )


def compare_orders(trace: Trace, capacity_bytes: int | None = None) -> tuple[Comparison, bool]:
    """The comparison in the order among cached blocks of one size that the recording's PyTorch had, and whether that is
    torch 2.14's (the oldest segment first) and not the lowest address. The file says neither; what puts more blocks
    where they were is it."""
    for newer in (False, True):
        try:
            return compare(trace, capacity_bytes, oldest_segment_first=newer, to_the_end=False), newer
        except Left:
            continue
    lowest, oldest = (compare(trace, capacity_bytes, oldest_segment_first=newer) for newer in (False, True))
    newer = (oldest.exact, oldest.blocks_matching) > (lowest.exact, lowest.blocks_matching)
    return (oldest if newer else lowest), newer


def what_if(
    trace: Trace,
    settings: AllocatorSettings,
    capacity_bytes: int | None,
    *,
    oldest_segment_first: bool = False,
    emptied: frozenset[int] | None = None,
) -> Run:
    """The trace's program under other settings, from an empty device: what was there before is allocated first. Where
    the program `emptied` the cache is as `compare` found it, or by default finds it now."""
    places = compare(trace, oldest_segment_first=oldest_segment_first).emptied if emptied is None else emptied
    before = [
        Event("a", address, requested or size, segment.stream)
        for segment in trace.initial
        for address, size, requested in segment.live
    ]
    allocator = Allocator(settings, capacity_bytes=capacity_bytes, oldest_segment_first=oldest_segment_first)
    program = program_of(trace, lambda place, request: place not in places)
    return simulate(itertools.chain(before, program), allocator)


def restore(allocator: Allocator, trace: Trace) -> dict[int, Block]:
    """Install the trace's initial state. Expandable ranges of one stream and pool are one segment with gaps. Which
    segments are older is not recorded; drivers give each a lower address than the last, where no other was freed."""
    blocks: dict[int, Block] = {}
    growing: dict[tuple[int, bool], list[int]] = {}
    for index, segment in reversed(list(enumerate(trace.initial))):
        if segment.expandable:
            growing.setdefault((segment.stream, segment.small), []).append(index)
        else:
            blocks |= allocator.adopt(
                segment.address, segment.size, small=segment.small, stream=segment.stream, live=segment.live
            )
    for (stream, small), indices in growing.items():
        parts = [trace.initial[index] for index in sorted(indices)]  # by address
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


def program_of(trace: Trace, needs_memory: Callable[[int, Event], bool]) -> Iterator[Event]:
    """What the program did: its allocations and frees, without what the allocator made of them.

    A free that completed later waited for another stream, which is stood in for by one stream per block. Where the
    recording gives segments back, or asks for one after such frees, `needs_memory(place, request)` says whether the
    allocator did it for the request that follows; else the program emptied the cache. An allocator that has no room
    waits for those frees itself, after it has looked for a block: they then come after the request.
    """
    events, waiting, index = trace.events, set[int](), 0
    while index < len(events):
        kind, address, size, stream = event = events[index]
        if kind in "ao":
            yield event if kind == "a" else Event("o", 0, size, stream)
        elif kind == "r":
            following = events[index + 1] if index + 1 < len(events) else None
            if following is not None and following[:2] == ("f", address):
                index += 1
            else:
                waiting.add(address)
                yield Event("u", address, 0, -1 - address)
            yield Event("f", address, 0, stream)
        else:
            end = index
            while end < len(events) and events[end].kind not in "aor":
                end += 1
            yield from between(events, index, end, waiting, needs_memory)
            index = end + 1 if end < len(events) and events[end].kind != "r" else end
            continue
        index += 1


def between(
    events: tuple[Event, ...], start: int, end: int, waiting: set[int], needs_memory: Callable[[int, Event], bool]
) -> Iterator[Event]:
    """What happened from `start` to before `end`, where frees completed and segments came and went, and the request at
    `end`, if it is one."""
    done: list[Event] = []
    for kind, address, _, stream in events[start:end]:
        if kind == "f" and address in waiting:
            waiting.discard(address)
            done.append(Event("y", 0, 0, -1 - address))
        elif kind == "f":
            done.append(Event("f", address, 0, stream))  # requested before the trace starts
    for stream in sorted({event.stream for event in events[start:end] if event.kind in "sU"}):
        if stream >= PRIVATE:  # its graphs are gone, else it would have kept its segments
            yield Event("g", 0, 0, stream)
    kinds = {event.kind for event in events[start:end]}
    request = events[end] if end < len(events) and events[end].kind != "r" else None
    asked = () if request is None else (request if request.kind == "a" else request._replace(address=0),)
    gives_back, asks = bool(kinds & {"s", "U"}), bool(kinds & {"S", "M"})
    tried = request is not None and (gives_back or (done and (asks or request.kind == "o")))
    if tried and request is not None and needs_memory(start, request):
        yield from (*asked, *done)
        return
    yield from done
    if gives_back and (request is None or request.kind != "o"):
        yield Event("e", 0, 0, 0)
    yield from asked


def recorded_peak(trace: Trace) -> int:
    """Most bytes reserved at once, by the recorded events."""
    reserved = peak = sum(segment.size for segment in trace.initial)
    for kind, _, size, _ in trace.events:
        reserved += size if kind in "SM" else -size if kind in "sU" else 0
        peak = max(peak, reserved)
    return peak


def explain_flushes(trace: Trace) -> Flushes:
    """What a recording says of the device's memory.

    The device was full if the segment asked for next would have gone beyond the peak and none of those given back could
    have served the request, but for blocks that PyTorch waited for only then. Its memory then lies between the peak and
    that sum. A failed request says how much was still free.
    """
    peak = recorded_peak(trace)
    reserved, index, events = sum(segment.size for segment in trace.initial), 0, trace.events
    least, beyond, late = None, None, list[int]()
    while index < len(events):
        kind, address, size, _ = events[index]
        if kind in "sU":
            before, released = reserved, set()
            while index < len(events) and events[index].kind in "sUf":
                kind, address, size, stream = events[index]
                if kind != "f":
                    reserved -= size
                    if not any(address <= block < address + size for block in late):
                        released.add((stream, size))
                index += 1
            asked, request = (*events[index : index + 2], None, None)[:2]
            if asked is not None and was_full(asked, request, before, peak, released):
                least = max(peak, least or 0)
                beyond = min(before + asked.size, beyond or before + asked.size)
            continue
        if kind in "ar":
            late.clear()
        elif kind == "f" and (not index or events[index - 1][:2] != ("r", address)):
            late.append(address)
        elif kind in "SM":
            reserved += size
        elif kind == "o":
            least = max(peak, reserved + address)
        index += 1
    return Flushes(least, beyond)


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
