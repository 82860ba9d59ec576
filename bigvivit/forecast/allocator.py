"""PyTorch's CUDA caching allocator as a model: which segments it asks of the device for a stream of requests.

Written after `DeviceCachingAllocator` in c10/cuda/CUDACachingAllocator.cpp (2026), whose functions are named where they
are followed. Needs no torch and no GPU.

Published traces of real GPUs confirm: rounding, the two pools, best fit with the lowest address first among equals,
splitting, coalescing, sizes and order of segments, flushes and retries, and how expandable segments grow. Written from
the source and in no trace: `record_stream`, `max_split_size_mb`, `roundup_power2_divisions`, garbage
collection, a memory fraction, another large segment size, unmapping, several streams. Not modelled: CUDA graphs and
private pools, `PYTORCH_NO_CUDA_MEMORY_CACHING`, `backend:cudaMallocAsync`.

The recordings come from torch 2.11 and older. torch 2.14 orders cached blocks of equal size by the age of their segment
before their address (pytorch/pytorch#183591; its library has `BlockComparatorSizeCounterAddress`), as the model does
where `oldest_segment_first` is set.

PyTorch's own allocator on virtual GPUs (forecast/virtual_gpu) confirms all of it but `record_stream`, for random
programs: every block, segment, flush and out-of-memory, on two streams, with expandable segments, `max_split_size_mb`,
garbage collection, a memory fraction, roundings and another large segment size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bigvivit.config import ConfigError
from bigvivit.forecast.alloc_conf import INTERVALS, AllocatorSettings
from bigvivit.forecast.blocks import Block, ExpandableSegment, Pool, is_idle, link_after, room
from bigvivit.units import MiB, format_bytes

MIN_BLOCK = 512  # kMinBlockSize
SMALL_REQUEST = MiB  # kSmallSize: the largest that the small pool serves
SMALL_SEGMENT = 2 * MiB  # kSmallBuffer
MIN_LARGE_SEGMENT = 10 * MiB  # kMinLargeAlloc: from here a segment is made for its request
SEGMENT_ROUNDING = 2 * MiB  # kRoundLarge
PRIVATE = 1 << 64  # streams from here on are those of private pools (CUDA graphs)


class SegmentEvent(NamedTuple):
    """What the allocator asked of the device; kinds as in the published traces."""

    kind: str
    """S: segment allocated, s: freed, M: pages mapped into an expandable segment, U: unmapped."""
    address: int
    size: int
    """Bytes."""
    stream: int


@dataclass(eq=False)
class OutOfMemory(Exception):  # noqa: N818 - the name PyTorch's users know
    """The device had no room for a segment, even after all cached segments were given back."""

    requested_bytes: int
    """What the program asked for."""
    segment_bytes: int
    """What the allocator then asked of the device."""
    reserved_bytes: int
    allocated_bytes: int
    limit_bytes: int
    """What the allocator may reserve: the capacity, or the memory fraction where that is less."""

    def __str__(self) -> str:
        cached = self.reserved_bytes - self.allocated_bytes
        return (
            f"out of memory: {format_bytes(self.requested_bytes)} asked for, a segment of "
            f"{format_bytes(self.segment_bytes)} needed, {format_bytes(self.reserved_bytes)} of "
            f"{format_bytes(self.limit_bytes)} reserved, of which {format_bytes(cached)} cannot be given back or used"
        )


def oldest_segment_first(torch_version: str) -> bool:
    """Whether this PyTorch takes the block in the oldest segment of cached ones of a size, and only then the lowest."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return (major, minor) >= (2, 14)


def descending_addresses(top: int = 1 << 46, step: int = 32 * MiB) -> Callable[[int], int]:
    """Addresses for new segments where no real ones are known: each below the last, in steps of 32 MiB.

    Free blocks of equal size are taken by address, so addresses matter; with these every published trace comes out with
    its real segments, with ascending ones some do not.
    """

    def reserve(size: int) -> int:
        nonlocal top
        top -= -(-size // step) * step
        return top

    return reserve


class Allocator:
    """One device's allocator. Sizes in bytes; a stream is any integer, 0 the default one.

    `capacity_bytes` is what the device can give in segments: its memory less what lies outside the allocator
    (`forecast.overhead`); None never runs out. `device_bytes` is the device's whole memory, of which the memory
    fraction and the address range of expandable segments are taken (default: the capacity). `reserve(size)` supplies
    addresses; `oldest_segment_first` is the order among equals since torch 2.14, see the function of that name.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        *,
        capacity_bytes: int | None = None,
        device_bytes: int | None = None,
        reserve: Callable[[int], int] | None = None,
        oldest_segment_first: bool = False,
    ) -> None:
        self.settings = settings = settings or AllocatorSettings()
        self.capacity_bytes = capacity_bytes
        device_bytes = device_bytes or capacity_bytes
        self._address_range = device_bytes or 1 << 40
        self._reserve = reserve or descending_addresses()
        self._oldest_segment_first, self._segments = oldest_segment_first, 0
        self._allowed: int | None = None
        if settings.per_process_memory_fraction < 1:
            if device_bytes is None:
                raise ConfigError(
                    f"per_process_memory_fraction={settings.per_process_memory_fraction} is a share of the device's "
                    "memory, which is not known: give the capacity"
                )
            self._allowed = int(settings.per_process_memory_fraction * device_bytes)
        self._collects = self._allowed is not None and settings.garbage_collection_threshold > 0
        self._rounds = max(settings.roundup_power2_divisions) > 1
        self._max_split = settings.max_split_bytes
        self._pools: dict[tuple[bool, int], Pool] = {}
        self._lookups = {False: 0, True: 0}
        self._events: dict[int, list[Block]] = {}
        self._released_pools: set[int] = set()
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.requested_bytes = 0
        self.flushes = 0
        """Times everything cached was given back because the device had no room (num_alloc_retries)."""
        self.log: list[SegmentEvent] = []

    def malloc(self, requested: int, stream: int = 0) -> Block:
        """A block of at least `requested` > 0 bytes. Raises OutOfMemory; the cache has been given back by then."""
        size = self.round_size(requested)
        pool = self._pool(size <= SMALL_REQUEST, stream)
        block = self._take_cached(pool, size)
        if block is None:
            if self._collects:
                self._collect_garbage()
            block = self._grow(pool, size)
            if block is None and self._release_oversize(pool, size):
                block = self._grow(pool, size)
            if block is None:
                self.flushes += 1
                self.empty_cache()
                block = self._grow(pool, size)
            if block is None:
                raise self._out_of_memory(requested, size)
        rest = block.size - size
        if pool.small or self.settings.expandable_segments:  # should_split
            splits = rest >= MIN_BLOCK
        else:
            splits = rest > SMALL_REQUEST and (self._max_split is None or size < self._max_split)
        if splits:
            self._split(block, size)
        block.allocated = True
        block.requested = requested
        self.requested_bytes += requested
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """Cache a block, or once the other streams that used it are done (`synchronize`)."""
        assert block.allocated, f"block at {block.address:#x} is not allocated"
        block.allocated = False
        self.allocated_bytes -= block.size
        self.requested_bytes -= block.requested
        if block.uses:
            block.pending = len(block.uses)
            for stream in block.uses:
                self._events.setdefault(stream, []).append(block)
            block.uses = None
        else:
            self._cache(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Another stream works on an allocated block. From the source; no published trace has it."""
        assert block.allocated, f"block at {block.address:#x} is not allocated"
        if stream != block.pool.stream:
            block.uses = (block.uses or set()) | {stream}

    def synchronize(self, stream: int) -> None:
        """All work given to a stream so far is done: blocks that were freed and waited only for it are cached.

        PyTorch notices at its next malloc (process_events); nothing looks at those blocks before that.
        """
        for block in self._events.pop(stream, ()):
            block.pending -= 1
            if not block.pending:
                self._cache(block)

    def empty_cache(self) -> None:
        """Give back what is cached (release_cached_blocks): large pool first, by stream, size and address; then of
        private pools whose graphs are gone, small first. Others keep what they have: graphs write there later."""
        for stream in list(self._events):
            self.synchronize(stream)
        own = [[pool for pool in self._by_stream(small) if pool.stream < PRIVATE] for small in (False, True)]
        for stream in sorted(self._released_pools):
            own += [[self._pool(small, stream)] for small in (True, False)]
        for pools in own:
            for pool in pools:
                for *_, block in list(pool.free):
                    if block.expandable is None and block.whole:
                        self._release(block)
            # expandable blocks after the others of the pool: unmapping changes the lists
            for pool in pools:
                for *_, block in list(pool.free):
                    if block.expandable is not None:
                        self._unmap(block)

    def release_pool(self, stream: int) -> None:
        """The graphs of a private pool are gone: from here on what it has cached is given back with the rest."""
        self._released_pools.add(stream)

    def adopt(
        self,
        address: int,
        size: int,
        *,
        small: bool,
        stream: int,
        live: Iterable[tuple[int, int, int]],
        expandable: bool = False,
        unmapped: Iterable[tuple[int, int]] = (),
    ) -> dict[int, Block]:
        """Install a segment that was there before: `live` are (address, size, requested) of its allocated blocks,
        `unmapped` (address, size) of the gaps in an expandable one, which goes on unmapped behind its end.

        Returns the blocks by address. Raises ConfigError where they do not lie in the segment one after the other.
        """
        pool, growing, total = self._pool(small, stream), None, size
        taken = [(*item, "live") for item in live] + [(start, length, 0, "unmapped") for start, length in unmapped]
        if expandable:
            page = self._page(small)
            total = max(-(-(self._address_range * 9 // 8) // page), -(-size // page)) * page
            growing = ExpandableSegment(address, total, page)
            taken += [(address + size, total - size, 0, "unmapped")] if total > size else []
        pieces, end = [], address
        for start, length, requested, state in [*sorted(taken), (address + total, 0, 0, "end")]:
            if start < end or start + length > address + total:
                raise ConfigError(
                    f"block of {length} B at {start:#x} overlaps another, or leaves its segment of {size} B at "
                    f"{address:#x}"
                )
            if start > end:
                pieces.append((end, start - end, 0, "cached"))
            pieces.append((start, length, requested, state))
            end = start + length
        blocks: dict[int, Block] = {}
        previous, number = None, 0 if expandable else self._next_segment()
        for start, length, requested, state in pieces[:-1]:
            block = Block(pool, start, length, growing, number)
            block.prev = previous
            if previous is not None:
                previous.next = block
            previous = block
            if state == "cached":
                self._insert(block)
            elif state == "unmapped":
                block.mapped = False
                pool.insert_unmapped(block)
                total -= length
            else:
                block.allocated, block.requested = True, requested
                self.allocated_bytes += length
                self.requested_bytes += requested
                blocks[start] = block
        self._count_reserved(total)
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return blocks

    def blocks(self) -> Iterator[Block]:
        """Cached and unmapped blocks of all pools, in no order that matters."""
        for pool in self._pools.values():
            yield from (block for *_, block in pool.free)
            yield from (block for _, block in pool.unmapped)

    def round_size(self, size: int) -> int:
        """Bytes that a request of `size` takes (round_size, roundup_power2_next_division)."""
        assert size > 0, "PyTorch asks its allocator for nothing where a tensor has no bytes"
        if self._rounds and size >= MIN_BLOCK:
            power = size.bit_length() - 1
            divisions = self.settings.roundup_power2_divisions[min(max(power - 20, 0), INTERVALS - 1)]
            if divisions > 1 and size > MIN_BLOCK * divisions:
                step = (1 << power) // divisions  # at least MIN_BLOCK, by the condition above
                return -(-size // step) * step
        return -(-size // MIN_BLOCK) * MIN_BLOCK

    def _segment_size(self, size: int) -> int:
        """get_allocation_size."""
        if size <= SMALL_REQUEST:
            return SMALL_SEGMENT
        if size < MIN_LARGE_SEGMENT:
            return self.settings.large_segment_bytes
        return -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING

    def _page(self, small: bool) -> int:
        return SMALL_SEGMENT if small else self.settings.large_segment_bytes

    def _pool(self, small: bool, stream: int) -> Pool:
        pool = self._pools.get((small, stream))
        if pool is None:
            pool = self._pools[small, stream] = Pool(small, stream)
        return pool

    def _by_stream(self, small: bool) -> list[Pool]:
        return [self._pools[key] for key in sorted(self._pools) if key[0] == small]

    def lacks_room(self, requested: int, stream: int = 0) -> bool:
        """Whether this request, now, would first have cached memory given back: the device has no room for it, or
        garbage is collected. Changes nothing."""
        size = self.round_size(requested)
        pool = self._pool(size <= SMALL_REQUEST, stream)
        if self._find_cached(pool, size) is not None:
            return False
        if self._collects:
            assert self._allowed is not None
            if self.reserved_bytes > int(self.settings.garbage_collection_threshold * self._allowed):
                return True
        segment = self._segment_size(size)
        if self._allowed is not None and self.reserved_bytes + segment > self._allowed:
            return True
        more = self._bytes_to_map(pool, size) if self.settings.expandable_segments else segment
        return self.capacity_bytes is not None and self.reserved_bytes + more > self.capacity_bytes

    def _take_cached(self, pool: Pool, size: int) -> Block | None:
        """Best fit (get_free_block)."""
        if self._collects:
            self._lookups[pool.small] += 1
        index = self._find_cached(pool, size)
        return None if index is None else pool.free.pop(index)[3]

    def _find_cached(self, pool: Pool, size: int) -> int | None:
        """Its place among the pool's cached blocks."""
        free, index = pool.free, bisect_left(pool.free, (size, 0))
        if index == len(free):
            return None
        if free[index][3].expandable is not None:
            if self.settings.expandable_segments:
                # A block at a segment's end counts as what it can grow to: others are taken before it.
                while (
                    index + 1 < len(free)
                    and free[index][3].expandable is not None
                    and room(free[index + 1][3]) < room(free[index][3])
                ):
                    index += 1
            else:
                while index < len(free) and free[index][3].expandable is not None:
                    index += 1
                if index == len(free):
                    return None
        found = free[index][0]
        if self._max_split is not None and (
            found >= self._max_split
            if size < self._max_split
            else found >= size + self.settings.max_non_split_rounding_bytes
        ):
            return None
        return index

    def _grow(self, pool: Pool, size: int) -> Block | None:
        """Ask the device for memory (alloc_block); None where it has no room."""
        segment = self._segment_size(size)
        if self._allowed is not None and self.reserved_bytes + segment > self._allowed:
            return None
        if self.settings.expandable_segments:
            return self._grow_expandable(pool, size)
        if self.capacity_bytes is not None and self.reserved_bytes + segment > self.capacity_bytes:
            return None
        block = Block(pool, self._reserve(segment), segment, segment=self._next_segment())
        self._count_reserved(segment)
        self.log.append(SegmentEvent("S", block.address, segment, pool.stream))
        return block

    def _next_segment(self) -> int:
        self._segments += self._oldest_segment_first
        return self._segments

    def _grow_expandable(self, pool: Pool, size: int) -> Block | None:
        """try_allocate_expandable_block; what could be mapped before the device was full stays mapped."""
        block = self._find_expandable(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.next
            assert following is not None
            if not self._map(following, min(size - block.size, following.size)):
                return None
            block = following
        block.pool.remove(block)
        return block

    def _bytes_to_map(self, pool: Pool, size: int) -> int:
        """What `_grow_expandable` would ask the device for, in whole pages."""
        page, idle = self._page(pool.small), 0
        for _, block in pool.unmapped:
            before = block.prev.size if block.prev is not None and is_idle(block.prev) else 0
            bytes_there, step = before, block
            while bytes_there < size and step is not None and is_idle(step):
                bytes_there += step.size
                step = step.next  # type: ignore[assignment]
            if bytes_there >= size:
                idle = before
                break
        return -(-(size - idle) // page) * page

    def _find_expandable(self, pool: Pool, size: int) -> Block:
        """The lowest address with enough idle or unmapped bytes, else a new segment (find_expandable_block)."""
        for _, unmapped in pool.unmapped:
            block: Block = unmapped
            if block.prev is not None and is_idle(block.prev):
                block = block.prev
            bytes_there, step = 0, block
            while bytes_there < size and step is not None and is_idle(step):
                bytes_there += step.size
                step = step.next  # type: ignore[assignment]
            if bytes_there >= size:
                return block
        page = self._page(pool.small)
        length = -(-(self._address_range * 9 // 8) // page) * page
        # A request beyond the address range cannot be met; the range is only there to be counted.
        length = max(length, -(-size // page) * page)
        segment = ExpandableSegment(self._reserve(length), length, page)
        block = Block(pool, segment.address, length, segment)
        block.mapped = False
        pool.insert_unmapped(block)
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Back the first `size` bytes of an unmapped block by memory, in whole pages (map_block)."""
        segment = block.expandable
        assert segment is not None
        size = -(-size // segment.page) * segment.page
        if self.capacity_bytes is not None and self.reserved_bytes + size > self.capacity_bytes:
            return False
        block.pool.remove_unmapped(block)
        block.mapped = True
        if size < block.size:
            rest = Block(block.pool, block.address + size, block.size - size, segment)
            rest.mapped = False
            link_after(block, rest)
            block.pool.insert_unmapped(rest)
            block.size = size
        self._count_reserved(size)
        self.log.append(SegmentEvent("M", block.address, size, block.pool.stream))
        self._merge(block, block.prev)
        self._merge(block, block.next)
        self._insert(block)
        return True

    def _unmap(self, block: Block) -> None:
        """Give back the whole pages inside a cached block; what is left before and behind stays (unmap_block)."""
        segment, pool = block.expandable, block.pool
        assert segment is not None
        first = segment.address + -(-(block.address - segment.address) // segment.page) * segment.page
        end = segment.address + (block.address + block.size - segment.address) // segment.page * segment.page
        if first >= end:
            return
        block.pool.remove(block)
        if first > block.address:
            before = Block(pool, block.address, first - block.address, segment)
            before.prev, before.next = block.prev, block
            if block.prev is not None:
                block.prev.next = before
            block.prev = before
            self._insert(before)
        if end < block.address + block.size:
            behind = Block(pool, end, block.address + block.size - end, segment)
            link_after(block, behind)
            self._insert(behind)
        block.address, block.size, block.mapped = first, end - first, False
        self._count_reserved(first - end)
        self.log.append(SegmentEvent("U", first, end - first, pool.stream))
        self._merge(block, block.prev)
        self._merge(block, block.next)
        if not block.whole:  # else nothing is left of the segment, and its addresses go too
            pool.insert_unmapped(block)

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.pool, block.address + size, block.size - size, block.expandable, block.segment)
        link_after(block, rest)
        block.size = size
        self._insert(rest)

    def _cache(self, block: Block) -> None:
        """free_block."""
        self._merge(block, block.prev)
        self._merge(block, block.next)
        self._insert(block)

    def _merge(self, block: Block, other: Block | None) -> None:
        """Take in a neighbour that is as idle as the block itself (try_merge_blocks)."""
        if other is None or other.mapped != block.mapped or not is_idle(other):
            return
        if other.mapped:
            other.pool.remove(other)
        else:
            other.pool.remove_unmapped(other)
        if block.prev is other:
            block.address, block.prev = other.address, other.prev
            if block.prev is not None:
                block.prev.next = block
        else:
            block.next = other.next
            if block.next is not None:
                block.next.prev = block
        block.size += other.size

    def _release(self, block: Block) -> None:
        """Give a whole segment back (release_block)."""
        block.pool.remove(block)
        self._count_reserved(-block.size)
        self.log.append(SegmentEvent("s", block.address, block.size, block.pool.stream))

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Give back the smallest unsplittable block that makes room, or the largest ones until their sum does
        (release_available_cached_blocks). Only with a max_split_size; from the source, no published trace has it."""
        if self._max_split is None:
            return False
        wanted = max(size, self._max_split)
        index = bisect_left(pool.free, (wanted, 0))
        if index < len(pool.free) and pool.free[index][3].expandable is None:
            self._release(pool.free[index][3])
            return True
        released = 0
        for found, _, _, block in reversed(pool.free[:index]):
            if released >= wanted or found < self._max_split:
                break
            if block.expandable is None:
                released += found
                self._release(block)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Give back whole large segments that have waited longer than the average, until enough is free
        (garbage_collect_cached_blocks). From the source; no published trace has it."""
        assert self._allowed is not None
        threshold = int(self.settings.garbage_collection_threshold * self._allowed)
        if self.reserved_bytes <= threshold:
            return
        target, reclaimed, lookups = self.reserved_bytes - threshold, 0, self._lookups[False]
        pools = [pool for pool in self._by_stream(False) if pool.stream < PRIVATE]
        whole = [block for pool in pools for *_, block in pool.free if block.whole]
        total_age, count = sum(lookups - block.age_base for block in whole), len(whole)
        freed = True
        while reclaimed < target and freed and count:
            freed, average, kept = False, total_age / count, []
            for block in whole:
                age = lookups - block.age_base
                if block.expandable is None and age >= average:
                    freed = True
                    reclaimed += block.size
                    total_age -= age
                    count -= 1
                    self._release(block)
                else:
                    kept.append(block)
            whole = kept

    def _out_of_memory(self, requested: int, size: int) -> OutOfMemory:
        limits = [limit for limit in (self._allowed, self.capacity_bytes) if limit is not None]
        return OutOfMemory(
            requested, self._segment_size(size), self.reserved_bytes, self.allocated_bytes, min(limits, default=0)
        )

    def _count_reserved(self, change: int) -> None:
        self.reserved_bytes += change
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _insert(self, block: Block) -> None:
        block.age_base = self._lookups[block.pool.small]
        block.pool.insert(block)
