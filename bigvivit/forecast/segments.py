"""Segments: what PyTorch's allocator asks of the device, in which sizes, and what it says where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
