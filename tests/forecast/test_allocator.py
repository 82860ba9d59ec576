"""The allocator model: against traces of real GPUs, against cases worked out from the C++ source, and for all inputs.

Cases name functions of c10/cuda/CUDACachingAllocator.cpp. Those marked "no trace" are confirmed by nothing else.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigvivit.config import ConfigError
from bigvivit.forecast.alloc_conf import AllocatorSettings, parse_conf
from bigvivit.forecast.allocator import Allocator
from bigvivit.forecast.blocks import Block
from bigvivit.forecast.recording import Trace
from bigvivit.forecast.replay import compare, explain_flushes, program_of, recorded_peak, restore
from bigvivit.forecast.segments import OutOfMemory, descending_addresses
from bigvivit.forecast.simulate import simulate
from bigvivit.forecast.snapshot import read_trace
from bigvivit.units import KiB, MiB
from tests.conftest import SHARED

TRACES = sorted(path.name for path in (SHARED / "traces").glob("*.jsonl.gz")) or ["none"]
FLUSHED_BY_A_FULL_DEVICE = {
    # flushes, and the bounds of the device's memory that the trace leaves open
    "HugePandaCoder_mem_snapshots_inference2_peso_oct_e024498.jsonl.gz": (1, 23238 * MiB, (18730 + 7014) * MiB),
    "HugePandaCoder_my_snapshot_0072096.jsonl.gz": (1, 21166 * MiB, (19054 + 4970) * MiB),
}


@pytest.fixture(params=TRACES)
def trace(request: pytest.FixtureRequest, shared: Callable[[str], Path]) -> Trace:
    return read_trace(shared(f"traces/{request.param}"))


def test_segments_of_a_real_gpu(trace: Trace) -> None:
    """Segments identical in order, size and address, pages mapped by address, the same peak."""
    found = compare(trace)
    assert found.segment_events_matching == found.segment_events
    assert found.segment_events_extra == 0
    assert found.run.peak_reserved_bytes == found.recorded_peak_reserved_bytes
    assert found.exact
    assert found.blocks_matching == found.blocks


def test_segments_of_a_real_gpu_at_made_up_addresses(trace: Trace) -> None:
    """What a forecast does: it has no driver to ask for addresses."""
    flushes = explain_flushes(trace)
    allocator = Allocator(trace.settings, capacity_bytes=flushes.least_bytes)
    blocks = restore(allocator, trace)
    program = program_of(trace, lambda place, request: allocator.lacks_room(request.size, request.stream))
    run = simulate(program, allocator, blocks)
    real = [(event.kind, event.size) for event in trace.events if event.kind in "SsMU"]
    ours = [(event.kind, event.size) for event in allocator.log]
    assert [event for event in ours if event[0] in "SM"] == [event for event in real if event[0] in "SM"]
    assert sorted(ours) == sorted(real)  # what a flush gives back goes by address
    assert run.peak_reserved_bytes == recorded_peak(trace)


@pytest.mark.parametrize("name", FLUSHED_BY_A_FULL_DEVICE)
def test_one_capacity_explains_the_flushes(name: str, shared: Callable[[str], Path]) -> None:
    """Any capacity the trace leaves open gives its flushes at the same places. With less the model cannot follow; with
    more it had no need of memory, and says that the program emptied the cache."""
    trace = read_trace(shared(f"traces/{name}"))
    flushes, least, beyond = FLUSHED_BY_A_FULL_DEVICE[name]
    found = explain_flushes(trace)
    assert (found.least_bytes, found.beyond_bytes) == (least, beyond)
    for capacity in (least, beyond - 1):
        replay = compare(trace, capacity_bytes=capacity)
        assert (replay.exact, replay.run.flushes) == (True, flushes)
    assert not compare(trace, capacity_bytes=least - 1).exact
    more = compare(trace, capacity_bytes=beyond)
    assert (more.exact, more.run.flushes, len(more.emptied)) == (True, 0, len(replay.emptied) + flushes)


def test_the_initial_state_is_used(shared: Callable[[str], Path]) -> None:
    """The check can fail: without what was there before, the segments come out otherwise."""
    trace = read_trace(shared("traces/cranberrii_memory_snapshot_ffe2e0c.jsonl.gz"))
    allocator = Allocator()
    blocks = restore(allocator, trace)
    allocator.empty_cache()
    simulate(program_of(trace, lambda place, request: True), allocator, blocks)
    real = [event.size for event in trace.events if event.kind == "S"]
    assert [event.size for event in allocator.log if event.kind == "S"] != real


def test_the_shared_traces_hold_no_case_that_is_called_unconfirmed(shared: Callable[[str], Path]) -> None:
    """The docstring of allocator.py names what no trace exercises: unmapping, several streams, deferred frees."""
    for name in TRACES:
        with gzip.open(shared(f"traces/{name}"), "rt") as file:
            header, *rows = map(json.loads, file)
        kinds = "".join(row[0] for row in rows)
        assert "U" not in kinds
        assert {row[3] for row in rows} == {0}
        assert kinds.count("r") == kinds.count("rf") == kinds.count("f")
        assert set(header["conf"] or "") <= set("expandable_segments:True")


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "block", "segment"),
    [
        (1, 512, 2 * MiB),
        (512, 512, 2 * MiB),
        (513, 1024, 2 * MiB),
        (MiB, MiB, 2 * MiB),  # kSmallSize is the largest small request
        (MiB + 1, 20 * MiB - 0, 20 * MiB),
        (10 * MiB - 512, 10 * MiB - 512, 20 * MiB),  # below kMinLargeAlloc
        (10 * MiB, 10 * MiB, 10 * MiB),
        (10 * MiB + 1, 12 * MiB, 12 * MiB),  # 2 MiB - 512 are left, more than 1 MiB: see below
        (11 * MiB, 12 * MiB, 12 * MiB),  # exactly 1 MiB is left: not split (remaining > kSmallSize)
    ],
)
def test_round_size_and_get_allocation_size(requested: int, block: int, segment: int) -> None:
    allocator = Allocator()
    found = allocator.malloc(requested)
    assert allocator.log[0][2] == segment
    if requested in (MiB + 1, 10 * MiB + 1):  # the rest is cached
        block = -(-requested // 512) * 512
    assert found.size == block


def test_the_small_pool_splits_down_to_512_bytes_the_large_one_to_1_mib() -> None:
    allocator = Allocator()
    small = allocator.malloc(MiB)
    assert (small.next and small.next.size) == MiB
    rest = allocator.malloc(MiB - 512)
    assert rest.next is not None
    assert rest.next.size == 512
    large = allocator.malloc(12 * MiB - 512)  # 12 MiB segment; 512 B are left
    assert large.size == 12 * MiB
    assert large.next is None


def test_pools_and_streams_do_not_share() -> None:
    allocator = Allocator()
    allocator.free(allocator.malloc(20 * MiB))
    allocator.malloc(MiB)  # small: not from the cached 20 MiB
    allocator.malloc(20 * MiB, stream=7)  # another stream: neither
    assert [event.size for event in allocator.log] == [20 * MiB, 2 * MiB, 20 * MiB]
    allocator.malloc(20 * MiB)
    assert len(allocator.log) == 3


def test_best_fit_takes_the_lowest_address_among_equals() -> None:
    addresses = iter([3 << 30, 1 << 30, 2 << 30, 5 << 30])
    allocator = Allocator(reserve=lambda size: next(addresses))
    blocks = [allocator.malloc(size) for size in (32 * MiB, 32 * MiB, 32 * MiB, 64 * MiB)]
    for block in blocks:
        allocator.free(block)
    assert [allocator.malloc(32 * MiB).address for _ in range(3)] == [1 << 30, 2 << 30, 3 << 30]


def test_free_neighbours_become_one() -> None:
    allocator = Allocator()
    blocks = [allocator.malloc(4 * MiB) for _ in range(5)]
    for index in (0, 2, 4, 1, 3):
        allocator.free(blocks[index])
    assert allocator.malloc(20 * MiB).address == blocks[0].address
    assert len(allocator.log) == 1


def test_out_of_memory_is_what_could_not_be_had() -> None:
    """16 MiB are cached and 16 free on the device: no sum helps a request for 17."""
    allocator = Allocator(capacity_bytes=56 * MiB)
    allocator.malloc(4 * MiB)  # of a segment of 20
    held = allocator.malloc(20 * MiB)
    assert allocator.reserved_bytes == 40 * MiB
    with pytest.raises(OutOfMemory) as raised:
        allocator.malloc(17 * MiB)
    assert raised.value.requested_bytes == 17 * MiB
    assert raised.value.segment_bytes == 18 * MiB
    assert raised.value.reserved_bytes == 40 * MiB
    assert "17 MiB asked for, a segment of 18 MiB needed" in str(raised.value)
    allocator.free(held)
    allocator.malloc(36 * MiB)  # now the flush finds a whole segment to give back
    assert allocator.flushes == 2
    assert [event.kind for event in allocator.log] == ["S", "S", "s", "S"]


def test_a_flush_gives_back_the_large_pool_first_by_stream_size_and_address() -> None:
    addresses = iter(range(1 << 40, 1 << 41, 1 << 30))
    allocator = Allocator(reserve=lambda size: next(addresses))
    wanted = [(MiB, 0), (64 * MiB, 0), (32 * MiB, 9), (48 * MiB, 0), (48 * MiB, 0), (MiB, 9)]
    for block in [allocator.malloc(size, stream) for size, stream in wanted]:
        allocator.free(block)
    allocator.empty_cache()
    assert [(event.size // MiB, event.stream) for event in allocator.log if event.kind == "s"] == [
        *((48, 0), (48, 0), (64, 0), (32, 9)),
        *((2, 0), (2, 9)),
    ]
    assert allocator.reserved_bytes == 0


# --- expandable segments ---------------------------------------------------------------------------------------------

EXPANDABLE = AllocatorSettings(expandable_segments=True)


def test_an_expandable_segment_grows_by_pages() -> None:
    allocator = Allocator(EXPANDABLE, capacity_bytes=1024 * MiB)
    first = allocator.malloc(30 * MiB)
    second = allocator.malloc(30 * MiB)  # 10 of it lie in the second page
    assert second.address == first.address + 30 * MiB
    assert [(event.kind, event.size) for event in allocator.log] == [("M", 40 * MiB), ("M", 20 * MiB)]
    small = allocator.malloc(512)
    assert allocator.log[-1][2] == 2 * MiB
    assert abs(small.address - first.address) >= 1024 * MiB * 9 // 8  # a range of addresses of its own


def test_pages_in_use_stay_mapped_and_no_trace() -> None:
    """unmap_block: only whole pages inside a free block are given back; the edges stay cached. No trace."""
    allocator = Allocator(EXPANDABLE, capacity_bytes=1024 * MiB)
    before, middle, behind = (allocator.malloc(size) for size in (10 * MiB, 60 * MiB, 10 * MiB))
    base = before.address
    allocator.free(middle)
    allocator.empty_cache()
    assert [event[:3] for event in allocator.log if event.kind == "U"] == [("U", base + 20 * MiB, 40 * MiB)]
    assert allocator.reserved_bytes == 40 * MiB
    cached = sorted((block.address - base, block.size) for block in allocator.blocks() if block.mapped)
    assert cached == [(10 * MiB, 10 * MiB), (60 * MiB, 10 * MiB)]
    # the hole is filled first (find_expandable_block): 10 MiB cached, one page mapped behind it
    again = allocator.malloc(25 * MiB)
    assert again.address == base + 10 * MiB
    assert allocator.log[-1][:3] == ("M", base + 20 * MiB, 20 * MiB)
    for block in (before, behind, again):
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert list(allocator.blocks()) == []  # release_expandable_segment: the addresses go too


def test_a_block_that_can_grow_counts_as_what_it_can_grow_to() -> None:
    """get_free_block: the end of a segment is the last resort, though it is the best fit now."""
    allocator = Allocator(EXPANDABLE, capacity_bytes=1024 * MiB)
    held = [allocator.malloc(size) for size in (15 * MiB, 12 * MiB, 5 * MiB)]
    allocator.free(held[0])  # 15 MiB inside, 8 MiB at the end of the mapped range
    assert allocator.malloc(7 * MiB).address == held[0].address


def test_what_was_mapped_before_the_device_was_full_stays_mapped() -> None:
    """Mapping is per hole: the first fits, the second does not, the flush unmaps it again."""
    allocator = Allocator(EXPANDABLE, capacity_bytes=100 * MiB)
    held = allocator.malloc(90 * MiB)
    with pytest.raises(OutOfMemory):
        allocator.malloc(20 * MiB)
    assert allocator.reserved_bytes == 100 * MiB
    allocator.free(held)
    assert allocator.malloc(100 * MiB).address == held.address


# --- from the source alone: no trace ---------------------------------------------------------------------------------


def test_record_stream_defers_the_free_and_no_trace() -> None:
    """free, insert_events: the block is not reused and not merged before every named stream is done."""
    allocator = Allocator()
    block = allocator.malloc(20 * MiB)
    allocator.record_stream(block, 0)  # its own stream needs no event
    allocator.record_stream(block, 5)
    allocator.record_stream(block, 6)
    allocator.free(block)
    assert allocator.allocated_bytes == 0
    other = allocator.malloc(20 * MiB)
    assert other.address != block.address
    allocator.synchronize(5)
    allocator.free(other)
    assert allocator.malloc(20 * MiB) is other
    allocator.synchronize(6)
    assert allocator.malloc(20 * MiB) is block


def test_a_flush_waits_for_deferred_frees_and_no_trace() -> None:
    """release_cached_blocks: synchronize_and_free_events comes first."""
    allocator = Allocator(capacity_bytes=40 * MiB)
    block = allocator.malloc(40 * MiB)
    allocator.record_stream(block, 5)
    allocator.free(block)
    allocator.malloc(40 * MiB)
    assert [event.kind for event in allocator.log] == ["S", "s", "S"]


def test_max_split_size_and_no_trace() -> None:
    """should_split, get_free_block, release_available_cached_blocks."""
    allocator = Allocator(parse_conf("max_split_size_mb:100"), capacity_bytes=500 * MiB)
    big = allocator.malloc(200 * MiB)
    allocator.free(big)
    assert allocator.malloc(50 * MiB) is not big  # an oversize block is not for smaller requests
    assert allocator.malloc(181 * MiB) is big  # within max_non_split_rounding (20 MiB): whole, not split
    assert big.size == 200 * MiB
    allocator.free(big)
    assert allocator.malloc(180 * MiB) is not big  # 200 >= 180 + 20
    # 200 cached, 50 and 180 in use, 70 left of 500: one oversize block is given back, without a flush
    allocator.malloc(100 * MiB)
    assert allocator.flushes == 0
    assert [(event.kind, event.size // MiB) for event in allocator.log[-2:]] == [("s", 200), ("S", 100)]


def test_several_oversize_blocks_are_given_back_from_the_largest_and_no_trace() -> None:
    allocator = Allocator(parse_conf("max_split_size_mb:100"), capacity_bytes=500 * MiB)
    for block in [allocator.malloc(size * MiB) for size in (110, 120, 130, 140)]:
        allocator.free(block)
    allocator.malloc(250 * MiB)
    assert allocator.flushes == 0
    assert [(event.kind, event.size // MiB) for event in allocator.log[4:]] == [("s", 140), ("s", 130), ("S", 250)]


@pytest.mark.parametrize(
    ("divisions", "size", "rounded"),
    [
        ("4", 1200, 1536),  # not above 512 * 4: the plain rule
        ("4", 2049, 2560),  # 2048, 2560, 3072, 3584, 4096
        ("4", 3 * MiB, 3 * MiB),
        ("4", 3 * MiB + 1, 3 * MiB + 512 * KiB),
        ("4", 4 * MiB, 4 * MiB),
        ("1", 3 * MiB + 1, 3 * MiB + 512),
        ("[256:1,512:2,1024:4,>:8]", 200 * MiB + 1, 200 * MiB + 512),
        ("[256:1,512:2,1024:4,>:8]", 600 * MiB, 768 * MiB),
        ("[256:1,512:2,1024:4,>:8]", 1100 * MiB, 1280 * MiB),
        ("[256:1,512:2,1024:4,>:8]", 2100 * MiB, 2304 * MiB),
        ("[256:1,512:2,1024:4,>:8]", 100 << 30, 104 << 30),  # beyond 64 GiB the last interval goes on
    ],
)
def test_roundup_power2_divisions_and_no_trace(divisions: str, size: int, rounded: int) -> None:
    """roundup_power2_next_division and AllocatorConfig's table of intervals."""
    assert Allocator(parse_conf(f"roundup_power2_divisions:{divisions}")).round_size(size) == rounded


@pytest.mark.parametrize(("threshold", "given_back"), [(0.6, []), (0.5, [200]), (0.2, [200, 240, 20])])
def test_garbage_collection_and_no_trace(threshold: float, given_back: list[int]) -> None:
    """garbage_collect_cached_blocks: what has waited longer than the average goes, again until enough is free."""
    conf = f"garbage_collection_threshold:{threshold},per_process_memory_fraction:0.9"
    allocator = Allocator(parse_conf(conf), capacity_bytes=1000 * MiB)
    old, young = allocator.malloc(200 * MiB), allocator.malloc(240 * MiB)
    allocator.free(old)
    for _ in range(4):
        allocator.free(allocator.malloc(20 * MiB, stream=1))
    allocator.free(young)
    # 460 MiB reserved of 900 allowed; seven lookups in, ages are 5 (old), 1 and 1: the average is 7/3, then 1
    allocator.malloc(300 * MiB)
    assert [event.size // MiB for event in allocator.log if event.kind == "s"] == given_back
    assert allocator.flushes == 0


def test_without_a_memory_fraction_the_threshold_does_nothing() -> None:
    """malloc: garbage_collect_cached_blocks asks for allowed_memory_maximum."""
    allocator = Allocator(parse_conf("garbage_collection_threshold:0.1"), capacity_bytes=1000 * MiB)
    allocator.free(allocator.malloc(500 * MiB))
    allocator.malloc(400 * MiB)
    allocator.malloc(450 * MiB)
    assert allocator.reserved_bytes == 950 * MiB


def test_a_memory_fraction_limits_what_is_reserved() -> None:
    """alloc_block: the segment counts, 20 MiB for 2, also where pages would be mapped."""
    for text in ("per_process_memory_fraction:0.5", "per_process_memory_fraction:0.5,expandable_segments:True"):
        allocator = Allocator(parse_conf(text), device_bytes=60 * MiB)
        allocator.malloc(20 * MiB)
        with pytest.raises(OutOfMemory) as raised:
            allocator.malloc(2 * MiB)
        assert raised.value.limit_bytes == 30 * MiB
    with pytest.raises(ConfigError, match="give the capacity"):
        Allocator(parse_conf("per_process_memory_fraction:0.5"))


# --- for all inputs --------------------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(1, 4 * KiB),
    st.sampled_from([MiB - 512, MiB, MiB + 1, 10 * MiB - 1, 10 * MiB, 19 * MiB + 1, 20 * MiB, 40 * MiB, 41 * MiB]),
    st.integers(1, 70 * MiB),
)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("a"), SIZES, st.integers(0, 2)),
        st.tuples(st.sampled_from("fu"), st.integers(0, 50), st.integers(0, 2)),
        st.tuples(st.sampled_from("ye"), st.just(0), st.integers(0, 2)),
    ),
    max_size=60,
)
SETTINGS = st.builds(
    AllocatorSettings,
    expandable_segments=st.booleans(),
    max_split_bytes=st.sampled_from([None, 20 * MiB, 32 * MiB]),
    max_non_split_rounding_bytes=st.sampled_from([20 * MiB, 24 * MiB]),
    roundup_power2_divisions=st.sampled_from([0, 1, 4, 16]).map(lambda value: (value,) * 16),
    garbage_collection_threshold=st.sampled_from([0.0, 0.3, 0.8]),
    per_process_memory_fraction=st.sampled_from([1.0, 0.7]),
    large_segment_bytes=st.sampled_from([20 * MiB, 12 * MiB]),
)


@settings(max_examples=300, deadline=None)
@given(OPERATIONS, SETTINGS, st.sampled_from([None, 60 * MiB, 150 * MiB]))
def test_no_bytes_overlap_are_lost_or_leak(
    operations: list[tuple[str, int, int]], conf: AllocatorSettings, capacity: int | None
) -> None:
    allocator = Allocator(conf, capacity_bytes=capacity, device_bytes=capacity or 300 * MiB)
    live: list[Block] = []
    waiting: list[Block] = []
    for kind, value, stream in operations:
        if kind == "a":
            with suppress(OutOfMemory):
                live.append(allocator.malloc(value, stream))
                assert live[-1].size >= live[-1].requested == value
                assert live[-1].pool.stream == stream
        elif kind == "u" and live:
            allocator.record_stream(live[value % len(live)], stream)
        elif kind == "f" and live:
            block = live.pop(value % len(live))
            allocator.free(block)
            waiting += [block] if block.pending else []
        elif kind == "y":
            allocator.synchronize(stream)
        elif kind == "e":
            allocator.empty_cache()
        waiting = [block for block in waiting if block.pending]
        check(allocator, live, waiting)
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.allocated_bytes, allocator.requested_bytes) == (0, 0, 0)
    # Addresses may be left of an expandable segment whose first page could not be had; PyTorch keeps them too.
    assert not any(block.mapped for block in allocator.blocks())


def check(allocator: Allocator, live: list[Block], waiting: list[Block]) -> None:
    """Blocks tile their segments: none overlaps, none is missing, and the counters are their sums."""
    idle = list(allocator.blocks())
    cached = [block for block in idle if block.mapped]
    assert all(block.allocated for block in live)
    assert not any(block.allocated or block.pending for block in idle)
    assert allocator.allocated_bytes == sum(block.size for block in live)
    assert allocator.requested_bytes == sum(block.requested for block in live)
    assert allocator.reserved_bytes == sum(block.size for block in (*live, *waiting, *cached))
    assert allocator.peak_reserved_bytes >= allocator.reserved_bytes
    if allocator.capacity_bytes is not None:
        assert allocator.reserved_bytes <= allocator.capacity_bytes
    ranges = sorted((block.address, block.address + block.size) for block in (*live, *waiting, *idle))
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    held = backed(allocator)
    for block in (*live, *waiting, *cached):
        assert covers(held, block.address, block.address + block.size)
    for block in (*live, *waiting, *idle):
        for neighbour in (block.next, block.prev):
            if neighbour is not None:
                assert neighbour.expandable is block.expandable
                assert not (is_cached(block) and is_cached(neighbour))  # or they would be one
        assert block.next is None or (block.next.prev is block and block.next.address == block.address + block.size)


def is_cached(block: Block) -> bool:
    return block.mapped and not block.allocated and not block.pending


def backed(allocator: Allocator) -> list[tuple[int, int]]:
    """Ranges with memory behind them, by the log of what was asked of the device."""
    pages: set[int] = set()
    for kind, address, size, _ in allocator.log:
        found = range(address, address + size, 2 * MiB)
        if kind in "SM":
            assert pages.isdisjoint(found)
            pages.update(found)
        else:
            assert pages.issuperset(found)
            pages.difference_update(found)
    return [(page, page + 2 * MiB) for page in sorted(pages)]


def covers(ranges: list[tuple[int, int]], start: int, end: int) -> bool:
    return sum(max(0, min(end, stop) - max(start, first)) for first, stop in ranges) == end - start


def test_addresses_are_aligned_and_descend() -> None:
    reserve = descending_addresses()
    found = [reserve(size) for size in (1, 32 * MiB, 33 * MiB)]
    assert all(address % (32 * MiB) == 0 for address in found)
    assert [a - b for a, b in pairwise(found)] == [32 * MiB, 64 * MiB]


def events(count: int) -> Iterator[tuple[str, int, int, int]]:
    """A program with a few hundred live blocks of all sizes."""
    for index in range(count // 2):
        yield ("a", index, (index * 7919) % 50021 * 97 + 1, index % 2)
        if index >= 300:
            yield ("f", index - 300, 0, 0)


def test_a_hundred_thousand_events(benchmark: Callable) -> None:
    """At most 2 s (bench/allocator.py records it)."""
    run = benchmark(lambda: simulate(events(100_000), Allocator()))
    assert run.peak_reserved_bytes >= run.peak_allocated_bytes > 0
