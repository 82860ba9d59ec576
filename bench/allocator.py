"""How fast the allocator model is, and which published traces it reproduces: `python bench/allocator.py [TRACES]`.

TRACES is a folder of gzip JSON lines (the project's shared/traces); without it only the speed is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bigvivit.forecast.alloc_conf import AllocatorSettings
from bigvivit.forecast.allocator import Allocator
from bigvivit.forecast.replay import compare
from bigvivit.forecast.simulate import simulate
from bigvivit.forecast.snapshot import read_trace
from bigvivit.training.report import run_bench, write_report
from bigvivit.units import GiB

EVENTS = 100_000


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time the allocator model and hold it to published traces."""

    traces: tyro.conf.Positional[Path | None] = None
    """Folder of published traces."""
    repeats: int = 7
    """Timed runs; the middle one counts."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Measure, replay, write."""
    program = list(synthetic_events(EVENTS))
    rows = [time_program("synthetic", program, AllocatorSettings(), arguments.repeats)]
    expandable = AllocatorSettings(expandable_segments=True)
    rows.append(time_program("synthetic", program, expandable, arguments.repeats))
    for path in sorted(arguments.traces.glob("*.jsonl.gz")) if arguments.traces else []:
        rows.append(replay_trace(path, arguments.repeats))
    settings = {"events": EVENTS, "repeats": arguments.repeats}
    stem = write_report(arguments.results, "allocator", device=torch.device("cpu"), settings=settings, rows=rows)
    print(f"wrote {stem}.json and .md")


def synthetic_events(count: int) -> list[tuple[str, int, int, int]]:
    """A program of some hundred live blocks of all sizes on two streams."""
    events: list[tuple[str, int, int, int]] = []
    for index in range(count):
        events.append(("a", index, (index * 7919) % 50021 * 97 + 1, index % 2))
        if index >= 300:
            events.append(("f", index - 300, 0, 0))
        if len(events) >= count:
            return events[:count]
    return events


def median_seconds(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The middle of several runs, and what the last one gave."""
    seconds, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def time_program(
    name: str, program: list[tuple[str, int, int, int]], settings: AllocatorSettings, repeats: int
) -> dict[str, Any]:
    """One row: a program through the model."""
    seconds, run = median_seconds(lambda: simulate(program, Allocator(settings, device_bytes=80 * GiB)), repeats)
    return {
        "program": name,
        "settings": settings.describe(),
        "events": len(program),
        "seconds": seconds,
        "peak_reserved_bytes": run.peak_reserved_bytes,
        "evidence": "measured",
    }


def replay_trace(path: Path, repeats: int) -> dict[str, Any]:
    """One row: a published trace beside the model."""
    trace = read_trace(path)
    seconds, found = median_seconds(lambda: compare(trace), repeats)
    return {
        "program": path.name.removesuffix(".jsonl.gz"),
        "settings": trace.settings.describe(),
        "events": len(trace.events),
        "seconds": seconds,
        "peak_reserved_bytes": found.run.peak_reserved_bytes,
        "recorded_peak_reserved_bytes": found.recorded_peak_reserved_bytes,
        "segment_events": found.segment_events,
        "segments_given_back": sum(event.kind in "sU" for event in trace.events),
        "segment_events_matching": found.segment_events_matching,
        "blocks": found.blocks,
        "blocks_at_recorded_address": found.blocks_matching,
        "exact": found.exact,
        "evidence": "measured",
    }


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
