"""What the allocator model keeps: pools of cached blocks, counts, and how blocks are split and joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bigvivit.config import ConfigError
from bigvivit.forecast.alloc_conf import INTERVALS, AllocatorSettings
from bigvivit.forecast.blocks import Block, Pool, is_idle, link_after
from bigvivit.forecast.segments import (
    MIN_BLOCK,
    MIN_LARGE_SEGMENT,
    SEGMENT_ROUNDING,
    SMALL_REQUEST,
    SMALL_SEGMENT,
    SegmentEvent,
    descending_addresses,
)


class Heap:
    """The state of one device's allocator; arguments are those of `Allocator`."""

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

    def _next_segment(self) -> int:
        self._segments += self._oldest_segment_first
        return self._segments

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

    def _insert(self, block: Block) -> None:
        block.age_base = self._lookups[block.pool.small]
        block.pool.insert(block)

    def _count_reserved(self, change: int) -> None:
        self.reserved_bytes += change
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
