"""Where blocks end that were there before a recording."""

from __future__ import annotations

import pytest

from bigvivit.forecast.alloc_conf import parse_conf
from bigvivit.forecast.recording import Event, Segment
from bigvivit.forecast.tails import find_tails
from bigvivit.units import MiB

BASE, SIZE = 1 << 40, 12 * MiB
BEHIND = Event("a", BASE + SIZE + MiB // 2, 3 * MiB, 0)
FREED = Event("f", BASE, SIZE, 0)


def end_of(segment_size: int, events: list[Event], conf: str = "", small: bool = False) -> int:
    """Bytes behind the request that belong to a block of 12 MiB at a segment's start."""
    segment = Segment(BASE, segment_size, 0, small, False, ((BASE, SIZE, SIZE),))
    (found,) = find_tails([segment], events, parse_conf(conf))
    return found.live[0][1] - SIZE


@pytest.mark.parametrize(
    ("events", "tail"),
    [
        ([], 0),
        ([BEHIND], MiB // 2),
        ([Event("a", BASE + SIZE, 3 * MiB, 0), BEHIND], 0),  # the first one says it
        ([FREED, BEHIND], 0),  # the block is gone by then
        ([Event("a", BASE + SIZE + 2 * MiB, 3 * MiB, 0)], 0),  # too far: between them lies a cached block
    ],
)
def test_the_first_allocation_behind_a_block_shows_its_end(events: list[Event], tail: int) -> None:
    assert end_of(40 * MiB, events) == tail


def test_what_is_too_little_to_be_cached_is_the_blocks_own() -> None:
    assert end_of(SIZE + MiB, []) == MiB
    assert end_of(SIZE + MiB + 512, []) == 0


def test_blocks_beyond_max_split_size_are_whole_segments() -> None:
    assert end_of(30 * MiB, [], "max_split_size_mb:20") == 0
    assert end_of(30 * MiB, [], "large_segment_size_mb:11,max_split_size_mb:12") == 18 * MiB


def test_small_and_expandable_blocks_are_split_to_the_end() -> None:
    assert end_of(SIZE + MiB, [], small=True) == 0
    assert end_of(SIZE + MiB, [BEHIND], "expandable_segments:True") == 0
