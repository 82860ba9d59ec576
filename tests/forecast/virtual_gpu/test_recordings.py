"""Programs on virtual GPUs against published recordings of real ones: the same allocations and frees, one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
from bigvivit.forecast.snapshot import read_trace
from bigvivit.forecast.virtual_gpu import virtual_gpu
from tests.forecast.virtual_gpu.recorder import number_events, play, watch
from tests.forecast.virtual_gpu.recordings import RECORDINGS, Recording
from tests.forecast.virtual_gpu.versions import takes_workspaces


@takes_workspaces
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "recording",
    [pytest.param(each, id=each.name, marks=[pytest.mark.slow] * ("medium" in each.name)) for each in RECORDINGS],
)
def test_a_program_is_that_of_a_real_gpu(recording: Recording, shared: Callable[[str], Path]) -> None:
    trace = read_trace(shared(f"traces/{recording.name}.jsonl.gz"))
    with virtual_gpu("A100 80GB") as gpu:
        watched = gpu.call(watch, recording.build, recording.arguments, recording.warm)
    wanted, found = number_events(trace.events), number_events(watched.during)
    assert len(wanted) > 60
    # What autocast had cast is released at once, in the order of a hash table of addresses.
    last = recording.autocast and max(at for at, (kind, _) in enumerate(wanted) if kind == "+") + 1
    assert found[: last or None] == wanted[: last or None]
    assert sorted(found, key=str) == sorted(wanted, key=str)
    before = [block for segment in trace.initial for block in segment.live]
    played = play(watched, recording.torch)
    assert played.requested_before_bytes == sum(requested for _, _, requested in before)
    recorded_reserved = sum(segment.size for segment in trace.initial)
    assert played.reserved_before_bytes == recorded_reserved
    assert played.peak_reserved_bytes == recorded_reserved + sum(each.size for each in trace.events if each.kind == "S")
