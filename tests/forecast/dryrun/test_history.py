"""Phases and lines of recorded allocations, in examples that can be added up by hand."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from bigvivit.forecast.dryrun.history import Interval, describe_device, find_caller, find_owner, write_events
from bigvivit.forecast.snapshot import read_trace
from bigvivit.units import MiB

PURELIB = sysconfig.get_paths()["purelib"]


def event(action: str, address: int, size: int, *frames: tuple[str, int, str]) -> dict[str, Any]:
    named = [dict(zip(("filename", "line", "name"), frame, strict=True)) for frame in frames]
    return {"action": action, "addr": address, "size": size, "stream": 0, "frames": named, "pool_id": (0, 0)}


def interval(step: int, phase: str, allocations: int, frees: int, peak: int, line: str = "") -> Interval:
    counters = {"allocations": allocations, "frees": frees, "peak_allocated": peak, "peak_reserved": 40 * MiB}
    return Interval(step, phase, line, {0: counters})


USER, LIBRARY = ("/home/someone/train.py", 7, "main"), (f"{PURELIB}/timm/vit.py", 5, "forward")
TORCH = (f"{PURELIB}/torch/nn/modules/linear.py", 134, "forward")
ENTRIES = [
    event("segment_alloc", 0, 20 * MiB, USER),
    event("alloc", 0, 4 * MiB, TORCH, USER),  # a weight
    event("alloc", 4 * MiB, 2 * MiB, TORCH, LIBRARY, USER),  # an activation
    event("segment_alloc", 1 << 40, 20 * MiB),
    event("alloc", 1 << 40, 4 * MiB),  # its gradient
    event("free_requested", 4 * MiB, 2 * MiB),
    event("free_completed", 4 * MiB, 2 * MiB),
    event("alloc", 4 * MiB, MiB + 1, USER),  # of the optimizer
]
INTERVALS = [
    interval(1, "loading", 1, 0, 4 * MiB),
    interval(1, "forward", 2, 0, 6 * MiB),
    interval(1, "backward", 3, 1, 10 * MiB, "train.py:8"),
    interval(1, "optimizer", 4, 1, 10 * MiB, "train.py:9"),
]


def test_each_phase_has_its_own_peak() -> None:
    found = describe_device(ENTRIES, INTERVALS, 0, 100)
    rows = [(row["step"], row["phase"], row["peak_allocated_bytes"] / MiB) for row in found["phases"]]
    last = 9 + 512 / MiB  # rounded up to a block
    assert rows == [
        ("loading", "loading", 4),
        ("first", "forward", 6),
        ("first", "backward", 10),
        ("first", "optimizer", last),
    ]
    assert [row["peak_reserved_bytes"] // MiB for row in found["phases"]] == [20, 20, 40, 40]
    assert found["complete"]


def test_lines_of_what_was_alive_at_the_peak() -> None:
    rows = describe_device(ENTRIES, INTERVALS, 0, 100)["largest"]
    assert [(row["bytes"] // MiB, row["phase"], row["line"], row["inside"]) for row in rows] == [
        (4, "loading", "/home/someone/train.py:7", ""),
        (4, "backward", "train.py:8", ""),  # autograd's thread has no Python stack: the line that called it
        (2, "forward", "/home/someone/train.py:7", "timm/vit.py:5 forward"),
    ]


def test_a_history_that_overflowed_claims_nothing() -> None:
    found = describe_device(ENTRIES, INTERVALS, 0, len(ENTRIES))
    assert found == {"complete": False, "phases": [], "largest": []}


def test_whose_a_file_is() -> None:
    assert find_owner("/home/someone/train.py") == "user"
    assert find_owner(f"{PURELIB}/timm/layers.py") == "library"
    for ours in (f"{PURELIB}/torch/optim/adam.py", f"{sysconfig.get_paths()['stdlib']}/threading.py", "<string>"):
        assert find_owner(ours) == "python"
    assert find_caller().startswith("tests/forecast/dryrun/test_history.py:")


def test_the_allocator_model_reads_what_is_kept(tmp_path: Path) -> None:
    write_events(ENTRIES, tmp_path / "0.jsonl.gz")
    trace = read_trace(tmp_path / "0.jsonl.gz")
    assert [(kind, size) for kind, _, size, _ in trace.events] == [
        *(("S", 20 * MiB), ("a", 4 * MiB), ("a", 2 * MiB), ("S", 20 * MiB), ("a", 4 * MiB)),
        *(("r", 2 * MiB), ("f", 2 * MiB), ("a", MiB + 1)),
    ]
    assert not trace.settings.expandable_segments
