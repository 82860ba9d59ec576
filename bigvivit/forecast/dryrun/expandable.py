"""What the setting that PyTorch's out-of-memory messages advise would change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bigvivit.forecast.alloc_conf import AllocatorSettings
from bigvivit.forecast.dryrun.launch import Outcome, dry_run, scratch_folder
from bigvivit.forecast.replay import compare, what_if
from bigvivit.forecast.snapshot import read_trace

EXPANDABLE = "expandable_segments:True"


def try_expandable(outcome: Outcome, folder: Path) -> dict[str, Any] | None:
    """What `expandable_segments:True` would change. A run that fits is replayed through the allocator model; one that
    does not is run again, since nobody knows what the program would have allocated next. None where it is on already,
    or there is nothing to say."""
    if outcome.word == "out of memory":
        with scratch_folder() as other:
            again = dry_run(replace(outcome.request, conf=EXPANDABLE), other)
        return {"by": "run again", "evidence": "virtual", "verdict": again.word, **again.peaks}
    if outcome.word != "fits":
        return None
    record, device = outcome.fullest
    events = folder / f"{record['pid']}.{device['device']}.jsonl.gz"
    if not events.exists():
        return None
    trace = read_trace(events)
    if trace.settings.expandable_segments:
        return None
    newer = has_newer_order(record["torch"])
    found = compare(trace, oldest_segment_first=newer)
    there = device["total_bytes"] - (device["peak_driver_bytes"] - device["peak_reserved_bytes"])
    run = what_if(trace, AllocatorSettings(expandable_segments=True), there, oldest_segment_first=newer)
    return {
        "by": "allocator model",
        "evidence": "forecast",
        "model_repeats_this_run": found.exact,
        "model_of_this_run_reserved_bytes": found.run.peak_reserved_bytes,
        "verdict": "fits" if run.out_of_memory is None else "out of memory",
        "peak_allocated_bytes": run.peak_allocated_bytes,
        "peak_reserved_bytes": run.peak_reserved_bytes,
    }


def has_newer_order(version: str) -> bool:
    """Whether this PyTorch takes the block of the oldest segment among cached ones of equal size: since 2.14."""
    return tuple(map(int, version.split(".")[:2])) >= (2, 14)
