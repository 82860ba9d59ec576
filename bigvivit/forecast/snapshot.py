"""Memory snapshots of PyTorch (`torch.cuda.memory._dump_snapshot`) and published traces, read as data.

A snapshot is a pickle. It is read by `plain_pickle`, which knows plain data and nothing that could be called, and keeps
what is looked at. What it holds: `segments`, the allocator's final state, and `device_traces`, the last events of each
device, as `torch.cuda.memory._snapshot` documents them.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import resource
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigvivit.config import ConfigError
from bigvivit.forecast.alloc_conf import AllocatorSettings, parse_conf
from bigvivit.forecast.allocator import Allocator
from bigvivit.forecast.plain_pickle import load
from bigvivit.forecast.ranges import Ranges
from bigvivit.forecast.recording import Event, Segment, Trace, expect
from bigvivit.forecast.segments import PRIVATE, SMALL_SEGMENT
from bigvivit.forecast.tails import find_tails
from bigvivit.units import GiB, MiB

LARGEST_BLOCK = 4096 * GiB  # no device has as much
LARGEST_ADDRESS = 1 << 63
KINDS = {
    **{"alloc": "a", "free_requested": "r", "free_completed": "f", "segment_alloc": "S", "segment_free": "s"},
    **{"segment_map": "M", "segment_unmap": "U", "oom": "o"},
}
LETTERS = frozenset(KINDS.values())
WORDS = frozenset(
    (
        *("segments", "device_traces", "allocator_settings", "PYTORCH_CUDA_ALLOC_CONF", ""),  # "": no settings
        *("device", "address", "total_size", "stream", "segment_type", "small", "segment_pool_id", "is_expandable"),
        *("blocks", "size", "requested_size", "state", "inactive"),
        *("action", "addr", "device_free", "pool_id", *KINDS),
    )
)
"""The keys and texts of a snapshot that a replay looks at; all else, stacks above all, is dropped while it is read."""


def read_trace(path: Path, device: int | None = None, conf: AllocatorSettings | None = None) -> Trace:
    """Read a snapshot (pickle) or a published trace (gzip JSON lines).

    `device` chooses one of several; `conf` says under which settings it was recorded, where the file does not. Raises
    ConfigError with what is wrong with the file; nothing of it is ever run.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(16)
        if start == b"SQLite format 3\0":
            raise ConfigError(
                "it is an SQLite database, not a pickle: write the snapshot with torch.cuda.memory._dump_snapshot"
            )
        packed = start[:2] == b"\x1f\x8b"
        with limited_memory(64 * size + GiB), without_collections():
            if packed:
                return check_blocks(read_jsonl(path, conf))
            with path.open("rb") as file:
                return check_blocks(from_snapshot(load(file, WORDS), path.name, device, conf))
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be replayed: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise ConfigError(
            f"{path} is no memory snapshot: reading it takes far more memory than a file of its size"
        ) from None
    except Exception as error:  # a broken pickle can raise anything; each means the same to the user
        raise ConfigError(
            f"{path} is no memory snapshot, or cut short ({type(error).__name__}: {error}): give a file of "
            "torch.cuda.memory._dump_snapshot, or a trace in gzip JSON lines"
        ) from None


@contextlib.contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Let this process allocate at most `more` bytes on top: a few bytes of pickle can ask for any amount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    except OSError:  # not Linux
        yield
        return
    limit = pages * resource.getpagesize() + more
    limits = [value for value in (soft, hard, limit) if value != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Plain containers of millions of numbers, which hold no cycles: looking for some would double the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def read_jsonl(path: Path, conf: AllocatorSettings | None) -> Trace:
    """A published trace: a header with the initial state, then `[kind, address, size, stream]` in each line."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            header = json.loads(next(file, ""))
            events, count = list[Event](), 0
            for line in file:  # no more than one of them as Python's lists and texts
                kind, *numbers = json.loads(line)
                count += 1
                if kind != "x":
                    events.append(to_event(kind, *numbers))
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"it is cut short or no JSON lines ({error})") from None
    expect(isinstance(header, dict) and "expandable" in header, "its first line is no header with `expandable`")
    expect(header.get("n_events", count) == count, f"its header says {header.get('n_events')} events, it has {count}")
    initial = []
    for row in header.get("initial_segments") or []:
        address, size, stream, pool, live = row
        blocks = tuple((address + offset, length, requested) for offset, length, requested in live)
        initial.append(Segment(address, size, stream, pool == "small", False, blocks))
    settings = conf or AllocatorSettings(expandable_segments=bool(header["expandable"]))
    tails = find_tails(initial, events, settings)
    return Trace(path.name, tails, tuple(events), settings, settings_known=conf is not None)


def from_snapshot(data: Any, name: str, device: int | None, conf: AllocatorSettings | None) -> Trace:
    """The trace of one device of a snapshot, with its initial state found by undoing the events from the final one."""
    expect(isinstance(data, dict) and isinstance(data.get("segments"), list), "it is no dict with a list of `segments`")
    traces = data.get("device_traces")
    expect(isinstance(traces, list) and all(isinstance(t, list) for t in traces or ()), "it has no `device_traces`")
    busy = [index for index, entries in enumerate(traces) if entries]
    expect(
        bool(busy), "it holds no events: call torch.cuda.memory._record_memory_history() before what is to be replayed"
    )
    if device is None:
        expect(len(busy) == 1, f"it holds events of devices {busy}: choose one, --device {busy[0]}")
        device = busy[0]
    expect(device in busy, f"it holds no events of device {device}, but of {busy}")
    named = isinstance(traces[device][0], dict) and "pool_id" in traces[device][0]
    events = read_entries(traces[device])
    final = [read_segment(raw) for raw in data["segments"] if raw.get("device", device) == device]
    expect(
        named or all(segment.stream < PRIVATE for segment in final),
        "it has private pools (CUDA graphs), but its events do not say whose they are: record it with a newer PyTorch",
    )
    settings, known = conf, conf is not None
    recorded = (data.get("allocator_settings") or {}).get("PYTORCH_CUDA_ALLOC_CONF")
    expect(recorded is None or isinstance(recorded, str), "its PYTORCH_CUDA_ALLOC_CONF is no text of its own")
    if settings is None and recorded is not None:
        settings, known = parse_conf(recorded), True
    if settings is None:
        expandable = any(event.kind in "MU" for event in events) or any(segment.expandable for segment in final)
        settings = AllocatorSettings(expandable_segments=expandable)
    return Trace(name, undo(final, events, settings), tuple(events), settings, known)


def read_entries(entries: list[Any]) -> list[Event]:
    """The events of a device. `entries` is used up: both at once would take twice the memory."""
    events: list[Event] = []
    entries.reverse()
    while entries:
        entry = entries.pop()
        expect(isinstance(entry, dict) and "action" in entry, "an event is no dict with an `action`")
        kind = KINDS.get(entry["action"])
        if kind is not None:
            address = entry["device_free"] if kind == "o" and "device_free" in entry else entry["addr"]
            stream, pool = entry.get("stream", 0), entry.get("pool_id")
            if pool is not None and pool != (0, 0):
                stream = pooled(stream, pool)
            events.append(to_event(kind, address, entry["size"], stream))
    return events


def pooled(stream: int, pool: Any) -> int:
    """The stream, by another number in each private pool: what pools and streams have does not mix, in the same way."""
    known = isinstance(pool, tuple | list) and len(pool) == 2
    expect(known and all(type(part) is int and 0 <= part < PRIVATE for part in pool), f"{pool!r} is no pool")
    return stream + PRIVATE * (pool[0] + PRIVATE * pool[1])


def to_event(kind: str, address: int, size: int, stream: int) -> Event:
    """One recorded event, its numbers checked: a snapshot is somebody's file. Raises what `expect` does."""
    if type(address) is type(size) is type(stream) is int and kind in LETTERS:
        if 0 <= address < LARGEST_ADDRESS and 0 <= size < LARGEST_BLOCK and (size or kind not in "aSsMU"):
            return Event(kind, address, size, stream)
        wrong = "has no size" if size == 0 and kind in "aSsMU" else "is out of range"
    else:
        wrong = "is none"
    raise ConfigError(f"event {kind!r} {(address, size, stream)} {wrong}")


def check_blocks(trace: Trace) -> Trace:
    """The trace, if only blocks that are there are freed, none is put where one is, and each lies in memory that was
    asked for; else a ConfigError."""
    live = {address for segment in trace.initial for address, _, _ in segment.live}
    requested: set[int] = set()
    memory = Ranges((segment.address, segment.address + segment.size) for segment in trace.initial)
    for kind, address, size, _ in trace.events:
        if kind == "a":
            expect(address not in live, f"it allocates a block at {address:#x}, where one is")
            expect(
                memory.hold(address, address + size),
                f"it allocates a block of {size} B at {address:#x}, outside every segment: what writes events of its "
                "own must write `segment_alloc` too, or the segments at the end",
            )
            live.add(address)
        elif kind in "rf":
            expect(address in live, f"it frees a block at {address:#x}, where none is")
            if kind == "r":
                expect(address not in requested, f"it frees the block at {address:#x} twice")
                requested.add(address)
            else:
                live.discard(address)
                requested.discard(address)
        elif kind in "SM":
            memory.add(address, address + size)
        elif kind in "sU":
            memory.remove(address, address + size)
    return trace


def read_segment(raw: Any) -> Segment:
    """A segment of a snapshot; older ones give no address to blocks, which lie one after the other."""
    expect(isinstance(raw, dict) and isinstance(raw.get("blocks"), list), "a segment is no dict with `blocks`")
    address, live = raw["address"], []
    for block in raw["blocks"]:
        # "active_pending_free" still occupies its place: another stream uses it
        if block["state"] != "inactive":
            live.append((address, block["size"], block.get("requested_size", block["size"])))
        address += block["size"]
    expect(0 < raw["total_size"] < LARGEST_BLOCK, f"a segment of {raw['total_size']} B is out of range")
    small, expandable = raw["segment_type"] == "small", bool(raw.get("is_expandable", False))
    stream = pooled(raw["stream"], raw.get("segment_pool_id", (0, 0)))
    return Segment(raw["address"], raw["total_size"], stream, small, expandable, tuple(live))


def undo(final: list[Segment], events: list[Event], settings: AllocatorSettings) -> tuple[Segment, ...]:
    """The state before the first event, by taking the events back from the last to the first.

    A block that was there before and freed in between is known by what was asked for; where it ends, `find_tails` says.
    Raises ConfigError where the events do not lead to the final state.
    """
    segments = {segment.address: segment for segment in final if not segment.expandable}
    pages = {
        page: (segment.stream, segment.small)
        for segment in final
        if segment.expandable
        for page in range(segment.address, segment.address + segment.size, MiB)
    }
    live = {address: (size, requested) for segment in final for address, size, requested in segment.live}
    broken = "its events do not lead to its final state: "
    for kind, address, size, stream in reversed(events):
        if kind == "a":
            expect(live.pop(address, (0, size))[1] == size, f"{broken}the block at {address:#x} is another")
        elif kind == "f":
            expect(address not in live, f"{broken}the block at {address:#x} is freed but there")
            live[address] = (0, size)
        elif kind == "S":
            expect(segments.pop(address, None) is not None, f"{broken}the segment at {address:#x} is missing")
        elif kind == "s":
            segments[address] = Segment(address, size, stream, size == SMALL_SEGMENT, False, ())
        elif kind == "M":
            for page in range(address, address + size, MiB):
                expect(pages.pop(page, None) is not None, f"{broken}the page at {page:#x} is missing")
        elif kind == "U":
            small = bool(size % settings.large_segment_bytes)
            pages.update(dict.fromkeys(range(address, address + size, MiB), (stream, small)))
    ranges = [*segments.values(), *join_pages(pages)]
    placed = (place(segment, live, settings) for segment in sorted(ranges, key=lambda segment: segment.address))
    return find_tails(placed, events, settings)


def join_pages(pages: dict[int, tuple[int, bool]]) -> list[Segment]:
    """Neighbouring MiB of one stream and pool as one range."""
    ranges: list[Segment] = []
    for page, (stream, small) in sorted(pages.items()):
        last = ranges[-1] if ranges else None
        if last and (last.address + last.size, last.stream, last.small) == (page, stream, small):
            ranges[-1] = replace(last, size=last.size + MiB)
        else:
            ranges.append(Segment(page, MiB, stream, small, True, ()))
    return ranges


def place(segment: Segment, live: dict[int, tuple[int, int]], settings: AllocatorSettings) -> Segment:
    """The segment with those of the live blocks that lie in it."""
    end = segment.address + segment.size
    inside = sorted(address for address in live if segment.address <= address < end)
    round_size = Allocator(replace(settings, per_process_memory_fraction=1.0)).round_size
    sizes = [(address, *live[address]) for address in inside]
    return replace(segment, live=tuple((address, size or round_size(asked), asked) for address, size, asked in sizes))
