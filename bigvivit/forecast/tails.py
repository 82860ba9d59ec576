"""Where blocks end that were there before a recording began: what its events say beyond their requests.

A block's size is known where it is in the final state of a snapshot. Of one that was freed in between, only the request
is; it may be larger, since PyTorch splits off no rest of 1 MiB or less in the large pool, and none at all of blocks
beyond `max_split_size_mb`. Such a rest is no block: what is cached in the large pool is larger.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from bigvivit.forecast.alloc_conf import AllocatorSettings
from bigvivit.forecast.allocator import Allocator
from bigvivit.forecast.recording import Event, Segment
from bigvivit.forecast.segments import SMALL_REQUEST


class Open(NamedTuple):
    """A block whose end is not known."""

    address: int
    end: int
    """Of the rounded request."""
    behind: int
    """Where the next block, or the end of the segment, is: it ends there or before."""


def find_tails(
    segments: Iterable[Segment], events: Iterable[Event], settings: AllocatorSettings
) -> tuple[Segment, ...]:
    """The initial state with the ends that can be told: of a block that may not be split, its segment's; of one with 1
    MiB or less behind it, there; of others where the first block lies that is allocated just behind them."""
    segments = tuple(segments)
    if settings.expandable_segments:
        return segments  # these split everything
    round_size = Allocator(replace(settings, per_process_memory_fraction=1.0)).round_size
    ends: dict[int, int] = {}
    unknown: list[Open] = []
    for segment in segments:
        if segment.small:
            continue
        places = [*sorted(address for address, _, _ in segment.live), segment.address + segment.size]
        for address, size, requested in segment.live:
            behind = places[bisect_right(places, address)]
            end = address + round_size(requested or size)
            if end < address + size or end >= behind:
                continue  # known already, or there is nothing behind it
            whole = settings.max_split_bytes is not None and end - address >= settings.max_split_bytes
            if whole or behind - end <= SMALL_REQUEST:
                ends[address] = behind
            else:
                unknown.append(Open(address, end, behind))
    ends |= first_behind(unknown, events)
    return tuple(
        replace(
            segment,
            live=tuple((each[0], ends.get(each[0], each[0] + each[1]) - each[0], each[2]) for each in segment.live),
        )
        for segment in segments
    )


def first_behind(unknown: list[Open], events: Iterable[Event]) -> dict[int, int]:
    """The ends of blocks that the first allocation behind them shows, while they are there."""
    unknown = sorted(unknown)
    starts = [block.address for block in unknown]
    open_blocks = dict(enumerate(unknown))
    by_address = {block.address: place for place, block in open_blocks.items()}
    ends: dict[int, int] = {}
    for kind, address, _, _ in events:
        if not open_blocks:
            break
        if kind == "f" and address in by_address:
            open_blocks.pop(by_address.pop(address), None)
        elif kind == "a":
            place = bisect_right(starts, address) - 1
            block = open_blocks.get(place)
            if block is not None and block.end <= address < min(block.end + SMALL_REQUEST + 1, block.behind):
                ends[block.address] = address
                del open_blocks[place]
    return ends
