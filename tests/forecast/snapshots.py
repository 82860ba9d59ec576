"""Memory snapshots in the documented format of `torch.cuda.memory._snapshot`, built from published traces.

A real one cannot be made without a GPU. These hold what the trace's publisher's file held: the final segments and the
events, without stack frames.
"""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

ACTIONS = {
    **{"a": "alloc", "r": "free_requested", "f": "free_completed", "S": "segment_alloc", "s": "segment_free"},
    **{"M": "segment_map", "U": "segment_unmap", "o": "oom", "x": "snapshot"},
}


def load(path: Path) -> tuple[dict[str, Any], list[list[Any]]]:
    """Header and events of a published trace."""
    with gzip.open(path, "rt") as file:
        header, *events = (json.loads(line) for line in file)
    return header, events


def segment(
    address: int, size: int, stream: int, pool: str, expandable: Any, blocks: list[list[Any]]
) -> dict[str, Any]:
    """One of `segments`; blocks are [size, state, requested]."""
    rows, start = [], address
    for length, state, requested in blocks:
        rows.append({"address": start, "size": length, "requested_size": requested, "state": state, "frames": []})
        start += length
    active = sum(row["size"] for row in rows if row["state"] != "inactive")
    return {
        **{"device": 0, "address": address, "total_size": size, "stream": stream, "segment_type": pool},
        **{
            "allocated_size": active,
            "active_size": active,
            "requested_size": active,
            "is_expandable": bool(expandable),
        },
        **{"segment_pool_id": (0, 0), "frames": [], "blocks": rows},
    }


def entry(kind: str, address: int, size: int, stream: int) -> dict[str, Any]:
    """One of `device_traces`."""
    where = {"device_free": address} if kind == "o" else {"addr": address}
    action = {"action": ACTIONS[kind], "size": size, "stream": stream, "time_us": 0, "frames": [], "pool_id": (0, 0)}
    return {**action, **where}


def snapshot(final: list[Any], events: list[Any], conf: str | None = None) -> dict[str, Any]:
    """The whole dict; the second device has no events."""
    return {
        "segments": [segment(*row) for row in final],
        "device_traces": [[entry(*row) for row in events], []],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": conf, "max_split_size": -1},
        "external_annotations": [],
    }


def dump(path: Path, data: Any) -> Path:
    """As `torch.cuda.memory._dump_snapshot` writes it."""
    path.write_bytes(pickle.dumps(data))
    return path
