"""`bigvivit replay`: what a memory snapshot's fragmentation cost, and what other settings would have done."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from bigvivit.config import ConfigError
from bigvivit.forecast.alloc_conf import INTERVALS, AllocatorSettings, parse_conf
from bigvivit.forecast.recording import Trace
from bigvivit.forecast.replay import Comparison, compare_orders, recorded_peak, what_if
from bigvivit.forecast.simulate import Run
from bigvivit.forecast.snapshot import read_trace
from bigvivit.units import MiB, format_bytes, parse_bytes

WHAT_IFS = (
    AllocatorSettings(),
    AllocatorSettings(expandable_segments=True),
    AllocatorSettings(max_split_bytes=128 * MiB),
    AllocatorSettings(roundup_power2_divisions=(8,) * INTERVALS),
)
"""Settings that a replay tries besides the recorded ones."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Replay the GPU allocations of a memory snapshot through a model of PyTorch's allocator: what fragmentation cost,
    and what other settings would have done. Needs no GPU; nothing in the file is run."""

    snapshot: Positional[Path]
    """File of `torch.cuda.memory._dump_snapshot`, recorded after `_record_memory_history()`; or a published trace in
    gzip JSON lines."""
    conf: str | None = None
    """PYTORCH_ALLOC_CONF it was recorded under, where the file does not say, such as `expandable_segments:True`."""
    try_conf: tuple[str, ...] = ()
    """Further settings to try, each as in PYTORCH_ALLOC_CONF."""
    capacity: str | None = None
    """Device memory for the allocator, such as `22.5GiB`, for the recorded run, where it fits, and the settings
    tried [default: as in the recording, where that can be seen]."""
    device: int | None = None
    """Which device, where the snapshot holds events of several."""
    json: bool = False
    """Print JSON instead of a table, all in bytes."""


def replay_snapshot(config: ReplayConfig) -> None:
    """`bigvivit replay`: read, replay, try other settings, print. Raises ConfigError for what cannot be read."""
    conf = None if config.conf is None else parse_conf(config.conf)
    tried = [*WHAT_IFS, *(parse_conf(text) for text in config.try_conf)]
    capacity = None
    if config.capacity is not None:
        try:
            capacity = parse_bytes(config.capacity)
        except ValueError as error:
            raise ConfigError(f"capacity={config.capacity}: {error}; write 22.5GiB, for instance") from None
    trace = read_trace(config.snapshot, config.device, conf)
    own = capacity if capacity is not None and capacity >= recorded_peak(trace) else None
    comparison, newer = compare_orders(trace, own)
    capacity = capacity or comparison.flushes.least_bytes
    others = [
        what_if(trace, settings, capacity, oldest_segment_first=newer, emptied=comparison.emptied)
        for settings in dict.fromkeys([trace.settings, *tried])
    ]
    if config.json:
        print(json.dumps(to_json(trace, comparison, others, capacity, newer), indent=2))
        return
    console = Console()
    console.print(build_table(trace, comparison, others, capacity))
    for line in findings(trace, comparison, capacity, newer):
        console.print(line, highlight=False)


def findings(trace: Trace, comparison: Comparison, capacity: int | None, newer: bool) -> list[str]:
    """What the table does not say: how far the replay can be trusted, and what the peak consisted of."""
    run, lines = comparison.run, []
    peak, segments = format_bytes(comparison.recorded_peak_reserved_bytes), comparison.segment_events
    order = "in the oldest segment (torch 2.14 and later)" if newer else "at the lowest address"
    lines.append(
        f"The model put {comparison.blocks_matching} of {comparison.blocks} blocks at their recorded addresses, taking "
        f"of cached blocks of one size the one {order}."
    )
    if comparison.exact:
        what = f"all {segments} times" if segments else "which was never"
        lines.append(
            f"It asked the device for memory and gave it back as recorded, {what}, and reserved as much at the peak."
        )
    else:
        lines.append(
            f"The model left the recording after {comparison.segment_events_matching} of {segments} segments (recorded "
            f"peak reserved: {peak}), so the table is the model's word alone. Were other settings in force? Give them "
            "with --conf."
        )
    if capacity is not None and capacity < comparison.recorded_peak_reserved_bytes:
        lines.append(f"The recording reserved {peak}, more than --capacity: its own row is that of a larger device.")
    if comparison.emptied:
        lines.append(f"The program emptied the cache {len(comparison.emptied)} times though there was room.")
    if not trace.settings_known:
        lines.append(f"The file does not say its settings; taken: {trace.settings.describe()}.")
    parts = (
        (run.requested_at_peak_bytes, "had been asked for"),
        (run.allocated_at_peak_bytes - run.requested_at_peak_bytes, "were rounding"),
        (run.fragmentation_bytes, "lay cached"),
    )
    what = ", ".join(f"{format_bytes(count)} {text}" for count, text in parts)
    lines.append(f"Of {format_bytes(run.peak_reserved_bytes)} reserved at the peak, at its fullest moment, {what}.")
    lines.append(
        "Rows of settings start on an empty device"
        + (", and first allocate what was there, since the recording starts midway" if trace.initial else "")
        + ": compare them with one another."
    )
    if run.out_of_memory is not None:
        lines.append(f"As recorded: {run.out_of_memory}.")
    if run.failed:
        lines.append(f"{run.failed} requests failed in the recording and in the replay.")
    return lines


def to_json(
    trace: Trace, comparison: Comparison, others: list[Run], capacity: int | None, newer: bool
) -> dict[str, Any]:
    """The same for programs; unlike the table it gives every number in bytes."""
    return {
        "name": trace.name,
        "evidence": "forecast",
        "settings_known": trace.settings_known,
        "starts_midway": bool(trace.initial),
        "exact": comparison.exact,
        **{key: value for key, value in vars(comparison).items() if key not in ("run", "flushes", "emptied")},
        "times_emptied": len(comparison.emptied),
        "oldest_segment_first": newer,
        "capacity_bytes": capacity,
        "capacity_least_bytes": comparison.flushes.least_bytes,
        "capacity_beyond_bytes": comparison.flushes.beyond_bytes,
        "recorded": run_to_json(comparison.run),
        "others": [run_to_json(run) for run in others],
    }


def run_to_json(run: Run) -> dict[str, Any]:
    """One row."""
    failure = None if run.out_of_memory is None else vars(run.out_of_memory)
    return {
        **vars(run),
        "settings": run.settings.describe(),
        "out_of_memory": failure,
        "fragmentation_bytes": run.fragmentation_bytes,
        "fragmentation_cost_bytes": run.fragmentation_cost_bytes,
    }


def build_table(trace: Trace, comparison: Comparison, others: list[Run], capacity: int | None) -> Table:
    """One row per settings; the first is the recorded run."""
    flushes = comparison.flushes
    device = "no end" if capacity is None else format_bytes(capacity)
    if capacity is not None and capacity == flushes.least_bytes:
        most = "" if flushes.beyond_bytes is None else f", and below {format_bytes(flushes.beyond_bytes)}"
        device += f": the least that explains the recorded flushes{most}"
    table = Table(
        *("settings", "peak allocated", "peak reserved", "cached at the peak", "fragmentation costs", "flushes"),
        "out of memory",
        title=f"{trace.name}: {comparison.blocks} allocations",
        caption=f"memory for the allocator: {device}",
    )
    for name, run in [("as recorded", comparison.run), *((run.settings.describe(), run) for run in others)]:
        table.add_row(
            name,
            format_bytes(run.peak_allocated_bytes),
            format_bytes(run.peak_reserved_bytes),
            format_bytes(run.fragmentation_bytes),
            format_bytes(run.fragmentation_cost_bytes),
            str(run.flushes),
            "no" if run.out_of_memory is None else f"at event {run.out_of_memory_event}",
        )
    return table
