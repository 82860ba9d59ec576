"""Snapshots of PyTorch's own allocator on a virtual GPU, replayed: every block at its address."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bigvivit.forecast.replay import compare_orders
from bigvivit.forecast.segments import PRIVATE
from bigvivit.forecast.snapshot import read_trace
from bigvivit.forecast.virtual_gpu import virtual_gpu
from bigvivit.units import GiB, MiB
from tests.forecast.virtual_gpu.agreement import random_program, record_graphs, run_program

slow = pytest.mark.slow
CASES = [
    pytest.param("", 1.0, 40 * GiB, False, id="default", marks=slow),
    pytest.param("", 1.0, 1100 * MiB, False, id="full", marks=slow),
    pytest.param("expandable_segments:True", 1.0, 1100 * MiB, False, id="expandable", marks=slow),
    pytest.param("max_split_size_mb:30", 1.0, 1100 * MiB, False, id="max_split"),
    pytest.param("garbage_collection_threshold:0.6", 0.02, 40 * GiB, False, id="collected"),
    pytest.param("", 1.0, 1100 * MiB, True, id="deferred"),
    pytest.param("max_split_size_mb:30", 1.0, 1100 * MiB, True, id="deferred_max_split", marks=slow),
    pytest.param("expandable_segments:True", 1.0, 1100 * MiB, True, id="deferred_expandable", marks=slow),
]


@pytest.mark.parametrize(("conf", "fraction", "memory", "defers"), CASES)
@pytest.mark.parametrize("start", [0, 1000])
@pytest.mark.usefixtures("library")
def test_a_recording_is_replayed_to_every_block(
    start: int, conf: str, fraction: float, memory: int, defers: bool, tmp_path: Path
) -> None:
    """Recorded from its start, or from midway on; a memory fraction is not in the file, so it is given. How long blocks
    have been cached is not in it either: what garbage collection gives back first is known from a start only."""
    if start and fraction < 1:
        pytest.skip("the ages of blocks that were there before are not recorded")
    path = tmp_path / "snapshot.pickle"
    operations = random_program(1, 3000, streams=2, defers=defers)
    with virtual_gpu("A100 80GB", memory_bytes=memory) as gpu:
        gpu.call(run_program, operations, conf, fraction, start, str(path))
    trace = read_trace(path)
    assert bool(trace.initial) == bool(start)
    trace = replace(trace, settings=replace(trace.settings, per_process_memory_fraction=fraction))
    found, _ = compare_orders(trace, memory if fraction < 1 else None)
    assert found.exact
    assert (found.blocks_matching, found.blocks > 800) == (found.blocks, True)


@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
@pytest.mark.usefixtures("library")
def test_graphs_keep_their_pools_until_they_are_gone(conf: str, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.pickle"
    with virtual_gpu("A100 80GB") as gpu:
        gpu.call(record_graphs, conf, str(path))
    trace = read_trace(path)
    assert len({event.stream for event in trace.events if event.stream >= PRIVATE}) == 3
    assert any(event.kind in "sU" and event.stream >= PRIVATE for event in trace.events)
    found, _ = compare_orders(trace)
    assert (found.exact, found.blocks_matching) == (True, found.blocks)
