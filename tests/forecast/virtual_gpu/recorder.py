"""What a program asks of PyTorch's allocator on a virtual GPU, beside what a published recording says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from bigvivit.forecast.allocator import Allocator
from bigvivit.forecast.blocks import Block
from bigvivit.forecast.recording import Event
from bigvivit.forecast.segments import oldest_segment_first
from bigvivit.forecast.simulate import simulate
from bigvivit.forecast.snapshot import KINDS


class Watched(NamedTuple):
    """A program's allocator from its first event on."""

    before: list[Event]
    """What led to the state before the run that was recorded."""
    during: list[Event]
    """What the run itself did."""
    reserved_bytes: int
    """Before the run."""
    peak_allocated_bytes: int
    """At most during it."""
    peak_reserved_bytes: int


def watch(build: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], warm: int) -> Watched:
    """`build(*arguments)()` after `warm` calls before it, from the process's first allocation on.

    What a run returns is alive until the end, as variables of a program's outermost level are; where it has a `clear`,
    that is called before each.
    """
    import torch

    torch.cuda.memory._record_memory_history(context=None, stacks="python", max_entries=10**7)
    run = build(*arguments)
    clear = getattr(run, "clear", lambda: None)
    for _ in range(warm):
        clear()
        run()
    clear()
    torch.cuda.reset_peak_memory_stats()
    before, reserved = read_events(), torch.cuda.memory_reserved()
    kept = run()
    events = read_events()
    torch.cuda.memory._record_memory_history(enabled=None)
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    del kept
    return Watched(before, events[len(before) :], reserved, *peaks)


class Played(NamedTuple):
    """The same program through the allocator model, in the order among equals of another PyTorch. All in bytes."""

    requested_before_bytes: int
    allocated_before_bytes: int
    reserved_before_bytes: int
    peak_allocated_bytes: int
    """During the run, as the next."""
    peak_reserved_bytes: int


def play(watched: Watched, torch_version: str) -> Played:
    """What this program would have taken with another PyTorch, on a card at whose end segments begin."""
    allocator = Allocator(oldest_segment_first=oldest_segment_first(torch_version))
    blocks: dict[int, Block] = {}
    simulate((event for event in watched.before if event.kind in "af"), allocator, blocks)
    before = allocator.requested_bytes, allocator.allocated_bytes, allocator.reserved_bytes
    allocator.peak_allocated_bytes, allocator.peak_reserved_bytes = before[1:]
    run = simulate((event for event in watched.during if event.kind in "af"), allocator, blocks)
    return Played(*before, run.peak_allocated_bytes, run.peak_reserved_bytes)


def read_events() -> list[Event]:
    import torch

    entries = torch.cuda.memory._snapshot()["device_traces"][0]
    return [
        Event(KINDS[entry["action"]], entry["addr"], entry["size"], entry["stream"])
        for entry in entries
        if entry["action"] in KINDS
    ]


def number_events(events: Iterable[Event]) -> list[tuple[str, int | None]]:
    """(+, bytes) and (-, number of the allocation; None for what was there before)."""
    numbers: dict[int, int] = {}
    found: list[tuple[str, int | None]] = []
    count = 0
    for kind, address, size, _ in events:
        if kind == "a":
            numbers[address] = count
            count += 1
            found.append(("+", size))
        elif kind == "f":
            found.append(("-", numbers.pop(address, None)))
    return found
