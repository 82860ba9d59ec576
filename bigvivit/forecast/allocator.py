"""PyTorch's CUDA caching allocator as a model: which segments it asks of the device for a stream of requests.

Written after `DeviceCachingAllocator` in c10/cuda/CUDACachingAllocator.cpp (2026), whose functions are named where they
are followed. Needs no torch and no GPU.

Published traces of real GPUs confirm: rounding, the two pools, best fit with the lowest address first among equals,
splitting, coalescing, sizes and order of segments, flushes and retries, and how expandable segments grow. They come
from torch 2.11 and older. torch 2.14 orders cached blocks of equal size by the age of their segment before their
address (pytorch/pytorch#183591; its library has `BlockComparatorSizeCounterAddress`), as the model does where
`oldest_segment_first` is set.

PyTorch's own allocator on virtual GPUs (forecast/virtual_gpu) confirms the rest for random programs, in
bench/virtual_truth.py and tests: every block, segment, flush and out-of-memory, on two streams, with `record_stream`,
expandable segments, `max_split_size_mb`, garbage collection, a memory fraction, roundings, another large segment size,
and private pools (CUDA graphs). Not modelled: `PYTORCH_NO_CUDA_MEMORY_CACHING`, `backend:cudaMallocAsync`.

Its parts: what is asked of the device (segments), what is kept (heap), expandable segments, what is given back
(releases); here requests are served.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from bigvivit.config import ConfigError
from bigvivit.forecast.blocks import Block, ExpandableSegment, Pool, room
from bigvivit.forecast.releases import ReleasingHeap
from bigvivit.forecast.segments import MIN_BLOCK, SMALL_REQUEST, OutOfMemory, SegmentEvent


class Allocator(ReleasingHeap):
    """One device's allocator. Sizes in bytes; a stream is any integer, 0 the default one.

    `capacity_bytes` is what the device can give in segments: its memory less what lies outside the allocator
    (`forecast.overhead`); None never runs out. `device_bytes` is the device's whole memory, of which the memory
    fraction and the address range of expandable segments are taken (default: the capacity). `reserve(size)` supplies
    addresses; `oldest_segment_first` is the order among equals since torch 2.14, see the function of that name.
    """

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

    def _out_of_memory(self, requested: int, size: int) -> OutOfMemory:
        limits = [limit for limit in (self._allowed, self.capacity_bytes) if limit is not None]
        return OutOfMemory(
            requested, self._segment_size(size), self.reserved_bytes, self.allocated_bytes, min(limits, default=0)
        )
