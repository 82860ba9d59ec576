"""Blocks and segments of the allocator model, and the lists they are kept in."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass


@dataclass
class ExpandableSegment:
    """A range of addresses whose pages are backed by memory one by one."""

    address: int
    size: int
    page: int
    """Bytes: 2 MiB in the small pool, the large segment size in the large one."""


class Block:
    """A piece of a segment: given to the program, cached, or (expandable segments only) an unmapped range."""

    __slots__ = (
        *("address", "size", "requested", "pool", "prev", "next", "allocated", "mapped", "expandable"),
        *("uses", "pending", "age_base", "segment"),
    )

    def __init__(
        self, pool: Pool, address: int, size: int, expandable: ExpandableSegment | None = None, segment: int = 0
    ) -> None:
        self.pool, self.address, self.size, self.expandable = pool, address, size, expandable
        self.segment = segment  # its number, in the order in which segments were made; 0 where that does not matter
        self.requested = 0
        self.allocated = False
        self.mapped = True
        self.prev: Block | None = None
        self.next: Block | None = None
        self.uses: set[int] | None = None  # other streams that record_stream named
        self.pending = 0  # of these, how many have not finished since the block was freed
        self.age_base = 0  # lookups in the pool before this block was cached

    @property
    def whole(self) -> bool:
        """Whether it is its whole segment."""
        return self.prev is None and self.next is None


class Pool:
    """Cached blocks of one stream, small or large, by size, segment and address (BlockComparatorSizeCounterAddress)."""

    __slots__ = ("free", "small", "stream", "unmapped")

    def __init__(self, small: bool, stream: int) -> None:
        self.small, self.stream = small, stream
        self.free: list[tuple[int, int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []

    def insert(self, block: Block) -> None:
        """Cache a mapped block."""
        insort(self.free, (block.size, block.segment, block.address, block))

    def remove(self, block: Block) -> None:
        """Take a cached block out, before its size or address changes."""
        index = bisect_left(self.free, (block.size, block.segment, block.address))
        assert self.free[index][3] is block
        del self.free[index]

    def insert_unmapped(self, block: Block) -> None:
        """Remember an unmapped range."""
        insort(self.unmapped, (block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        """Forget an unmapped range, before its address changes."""
        index = bisect_left(self.unmapped, (block.address,))
        assert self.unmapped[index][1] is block
        del self.unmapped[index]


def is_idle(block: Block) -> bool:
    """Neither allocated nor waiting for a stream."""
    return not block.allocated and not block.pending


def room(block: Block) -> int:
    """What an expandable block can grow to, in bytes."""
    return block.size + (block.next.size if block.next is not None and not block.next.mapped else 0)


def link_after(block: Block, new: Block) -> None:
    """Put a block behind another in its segment."""
    new.prev, new.next = block, block.next
    if block.next is not None:
        block.next.prev = new
    block.next = new
