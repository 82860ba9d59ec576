"""Expandable segments of the allocator model: ranges of addresses whose pages are mapped and unmapped."""

from __future__ import annotations

from bigvivit.forecast.blocks import Block, ExpandableSegment, Pool, is_idle, link_after
from bigvivit.forecast.heap import Heap
from bigvivit.forecast.segments import SegmentEvent


class ExpandableHeap(Heap):
    """A heap that grows page by page."""

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
