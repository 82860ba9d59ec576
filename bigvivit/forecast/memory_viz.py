"""A trace for pytorch.org/memory_viz, which reads pickles of PyTorch's memory snapshots and nothing else.

The file holds dicts, lists, text and numbers, so reading it runs nothing; `bigvivit replay` reads it too.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from bigvivit.forecast.trace import Trace
from bigvivit.forecast.tracker import Allocation

BASE = 1 << 40
"""The first block's address. No two blocks share one: where an allocator puts them is not known to a trace."""


def write_snapshot(trace: Trace, path: Path, device: str = "cpu") -> None:
    """All events of one device. A storage that is resized is another block; stacks say cause, module and operator."""
    entries: list[dict[str, Any]] = []
    live: dict[Allocation, dict[str, Any]] = {}
    end = BASE
    for event in trace.events:
        if event.allocation.device != device:
            continue
        block = live.pop(event.allocation, None)
        size = event.change
        if block is not None:
            size += block["size"]
            entries += [{**block, "action": action} for action in ("free_requested", "free_completed")]
        if size > 0:
            stream, frames = event.allocation.stream, describe(event.allocation)
            block = {"action": "alloc", "addr": end, "size": size, "stream": stream, "frames": frames}
            live[event.allocation] = block
            entries.append(block)
            end += size
    blocks, place = [], BASE
    for block in live.values():
        blocks.append({"address": place, "size": block["addr"] - place, "requested_size": 0, "state": "inactive"})
        blocks.append(
            {
                "address": block["addr"],
                "size": block["size"],
                "requested_size": block["size"],
                "state": "active_allocated",
                "frames": block["frames"],
            }
        )
        place = block["addr"] + block["size"]
    blocks.append({"address": place, "size": end - place, "requested_size": 0, "state": "inactive"})
    segment = {
        "device": 0,
        "address": BASE,
        "total_size": end - BASE,
        "stream": 0,
        "segment_type": "large",
        "allocated_size": sum(block["size"] for block in live.values()),
        "active_size": sum(block["size"] for block in live.values()),
        "blocks": [block for block in blocks if block["size"]],
    }
    # memory_viz does not know what later protocols write, which newer versions of Python take by default
    path.write_bytes(pickle.dumps({"segments": [segment], "device_traces": [entries]}, protocol=4))


def describe(allocation: Allocation) -> list[dict[str, Any]]:
    """A stack, innermost first."""
    step = f"step {allocation.step}, {allocation.phase}"
    names = (allocation.op, allocation.module or "-", allocation.cause, step)
    return [{"filename": "", "line": 0, "name": name} for name in names if name]
