"""When the allocator model gives segments back: a flush, blocks beyond `max_split_size_mb`, garbage collection."""

from __future__ import annotations

from bisect import bisect_left

from bigvivit.forecast.blocks import Block, Pool
from bigvivit.forecast.expandable import ExpandableHeap
from bigvivit.forecast.segments import PRIVATE, SegmentEvent


class ReleasingHeap(ExpandableHeap):
    """A heap that can shrink."""

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
