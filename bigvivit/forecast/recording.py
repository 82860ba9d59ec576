"""What a recording of PyTorch's allocator holds: events, and the state before the first of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bigvivit.config import ConfigError
from bigvivit.forecast.alloc_conf import AllocatorSettings


class Event(NamedTuple):
    """One line of a trace. Kinds: a allocated, r free requested, f free completed, S s M U as in `SegmentEvent`,
    o out of memory. Programs (`forecast.simulate`) know further ones."""

    kind: str
    address: int
    """Of the block or segment; of `o` the bytes the device still had."""
    size: int
    """Bytes; of a block what was asked for."""
    stream: int


@dataclass(frozen=True)
class Segment:
    """A segment and its allocated blocks: (address, size, requested)."""

    address: int
    size: int
    stream: int
    small: bool
    expandable: bool
    live: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Trace:
    """What one device's allocator did."""

    name: str
    initial: tuple[Segment, ...]
    """The state before the first event."""
    events: tuple[Event, ...]
    settings: AllocatorSettings
    settings_known: bool
    """Whether the file says them; otherwise only `expandable_segments` is seen, in the events."""


def expect(holds: bool, otherwise: str) -> None:
    """Raise ConfigError where the file is not what it should be."""
    if not holds:
        raise ConfigError(otherwise)
