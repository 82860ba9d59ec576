"""What PyTorch's allocator recorded, by phases of a step and by lines of the user's code. Plain data, no torch."""

from __future__ import annotations

import functools
import gzip
import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = 512
"""Bytes that PyTorch's allocator rounds requests up to."""
LARGEST = 12
"""Groups of tensors that a record names."""
GROWING, SHRINKING = ("segment_alloc", "segment_map"), ("segment_free", "segment_unmap")
OWN = Path(__file__).resolve().parents[1]
KINDS = {
    **{"alloc": "a", "free_requested": "r", "free_completed": "f", "segment_alloc": "S", "segment_free": "s"},
    **{"segment_map": "M", "segment_unmap": "U", "oom": "o"},
}
"""Letters of the events that `forecast.snapshot` reads."""


class Interval(NamedTuple):
    """One phase of one step, and each device's counters at its end."""

    step: int
    phase: str
    line: str
    """Of the user's code, that called the phase."""
    counters: dict[int, dict[str, int]]


def describe_device(
    entries: list[dict[str, Any]], intervals: list[Interval], device: int, most_events: int
) -> dict[str, Any]:
    """Phases with their peaks, the largest tensors at the peak, and whether all events were there to see."""
    own = [interval for interval in intervals if device in interval.counters]
    made = sum(entry["action"] == "alloc" for entry in entries)
    if len(entries) >= most_events or not own or made != own[-1].counters[device]["allocations"]:
        return {"complete": False, "phases": [], "largest": []}
    peaks, place = find_peaks(entries, own, device)
    return {
        "complete": not any(tuple(entry.get("pool_id", (0, 0))) != (0, 0) for entry in entries),
        "phases": list(join_phases(own, peaks)),
        "largest": group_live(entries, own, device, place),
    }


def find_peaks(
    entries: list[dict[str, Any]], intervals: list[Interval], device: int
) -> tuple[list[tuple[int, int]], int]:
    """Most bytes allocated and reserved in each interval, and at which event most were allocated.

    An interval ends where as many allocations and frees had been made as its counters say. Where it raised the peak of
    the allocator's own counters, the counters are taken: recorded requests do not show blocks that were not split.
    """
    peaks: list[tuple[int, int]] = []
    allocated = reserved = most = place = position = 0
    made = freed = peak_before = 0
    for interval in intervals:
        counters, high, high_reserved = interval.counters[device], allocated, reserved
        while position < len(entries) and (made < counters["allocations"] or freed < counters["frees"]):
            kind, size = entries[position]["action"], entries[position]["size"]
            made += kind == "alloc"
            freed += kind == "free_requested"
            allocated += round_up(size) * ((kind == "alloc") - (kind == "free_requested"))
            reserved += size * ((kind in GROWING) - (kind in SHRINKING))
            if allocated > most:
                most, place = allocated, position
            high, high_reserved = max(high, allocated), max(high_reserved, reserved)
            position += 1
        rose = counters["peak_allocated"] > peak_before
        high = counters["peak_allocated"] if rose else min(high, counters["peak_allocated"])
        peaks.append((high, min(high_reserved, counters["peak_reserved"])))
        peak_before = counters["peak_allocated"]
    return peaks, place


def round_up(size: int) -> int:
    """As the allocator counts a request."""
    return -(-size // BLOCK) * BLOCK


def join_phases(intervals: list[Interval], peaks: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """One row per phase: loading, then forward, backward and optimizer of the first step and of all later ones."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for interval, (allocated, reserved) in zip(intervals, peaks, strict=True):
        when = "loading" if interval.phase == "loading" else "first" if interval.step == 1 else "later"
        row = rows.setdefault((when, interval.phase), {"peak_allocated_bytes": 0, "peak_reserved_bytes": 0})
        row["peak_allocated_bytes"] = max(row["peak_allocated_bytes"], allocated)
        row["peak_reserved_bytes"] = max(row["peak_reserved_bytes"], reserved)
    for (when, phase), row in rows.items():
        yield {"step": when, "phase": phase, **row}


def group_live(
    entries: list[dict[str, Any]], intervals: list[Interval], device: int, place: int
) -> list[dict[str, Any]]:
    """What was alive after an event, the most bytes first: one group per line of code and phase that made it."""
    live: dict[int, tuple[dict[str, Any], int]] = {}
    done, index = 0, 0
    for entry in entries[: place + 1]:
        if entry["action"] == "alloc":
            while index < len(intervals) - 1 and done >= intervals[index].counters[device]["allocations"]:
                index += 1
            done += 1
            live[entry["addr"]] = entry, index
        elif entry["action"] == "free_requested":
            live.pop(entry["addr"], None)
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry, index in live.values():
        frames = [(frame["filename"], frame["line"], frame["name"]) for frame in entry.get("frames", ())]
        line, inside = find_lines(frames)
        phase = intervals[index].phase if intervals else "loading"
        line = line or (intervals[index].line if intervals else "")
        group = groups.setdefault((line, inside, phase), {"bytes": 0, "count": 0, "largest_bytes": 0})
        group["bytes"] += entry["size"]
        group["count"] += 1
        group["largest_bytes"] = max(group["largest_bytes"], entry["size"])
    rows = [
        {"line": line, "inside": inside, "phase": phase, **group} for (line, inside, phase), group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])[:LARGEST]


def find_lines(frames: Sequence[tuple[str, int, str]]) -> tuple[str, str]:
    """The innermost line of the user's, and the innermost one of a library other than PyTorch where that is not it."""
    inside = ""
    for filename, line, name in frames:
        owner = find_owner(filename)
        if owner == "user":
            return f"{shorten(filename)}:{line}", inside
        if owner == "library" and not inside:
            inside = f"{shorten(filename)}:{line} {name}"
    return "", inside


def find_caller() -> str:
    """The line of the user's code that is running, or "" where there is none on this thread."""
    frame = sys._getframe(1)
    while frame is not None:
        if find_owner(frame.f_code.co_filename) == "user":
            return f"{shorten(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@functools.cache
def find_owner(filename: str) -> str:
    """Whose a file is: the `user`'s, a `library`'s, or `python`'s (with PyTorch's, and ours that watch)."""
    if filename.startswith("<"):
        return "python"
    path = Path(filename)
    parts = path.parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            package = parts[parts.index(folder) + 1]
            return "python" if package in ("torch", "sitecustomize.py") else "library"
    paths = sysconfig.get_paths()
    homes = [Path(paths[name]) for name in ("stdlib", "platstdlib", "scripts")]
    homes += [OWN / "dryrun", OWN / "virtual_gpu"]
    return "python" if any(home in path.parents for home in homes) else "user"


@functools.cache
def shorten(filename: str) -> str:
    """Relative to the folder of its packages, or to the one the program runs in."""
    path = Path(filename)
    for folder in ("site-packages", "dist-packages"):
        if folder in path.parts:
            return str(Path(*path.parts[path.parts.index(folder) + 1 :]))
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return filename


def write_events(entries: list[dict[str, Any]], path: Path) -> None:
    """For the allocator model, as `forecast.snapshot.read_trace` reads it: without stacks."""
    rows = []
    for entry in entries:
        kind = KINDS.get(entry["action"])
        if kind is not None:
            address = entry["device_free"] if kind == "o" and "device_free" in entry else entry["addr"]
            rows.append([kind, address, entry["size"], entry["stream"]])
    expandable = any(row[0] in "MU" for row in rows)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for row in ({"expandable": expandable, "n_events": len(rows), "initial_segments": []}, *rows):
            file.write(json.dumps(row) + "\n")
