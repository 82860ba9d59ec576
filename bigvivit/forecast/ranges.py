"""Ranges of addresses that hold memory."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable


class Ranges:
    """Ranges that do not overlap, from one address to before another; neighbours are one."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """One more, with what of it was there."""
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]

    def remove(self, start: int, end: int) -> None:
        """What of this is there."""
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        if first >= last:
            return
        before, behind = self._starts[first], self._ends[last - 1]
        kept = [each for each in ((before, start), (end, behind)) if each[0] < each[1]]
        self._starts[first:last] = [each[0] for each in kept]
        self._ends[first:last] = [each[1] for each in kept]

    def hold(self, start: int, end: int) -> bool:
        """Whether all of this lies in one."""
        place = bisect_right(self._starts, start) - 1
        return place >= 0 and end <= self._ends[place]
