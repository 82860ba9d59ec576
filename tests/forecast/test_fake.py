"""What is changed so that engines run on fake tensors: each change is needed, and none changes the trace."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from bigvivit.forecast.trace import Trace
from bigvivit.trial import Trial, trace_trial
from tests.launching import ROOT, environment

SMALL: dict[str, Any] = {"tower": "vit-demo", "size": 48, "frames": 8, "temporal_depth": 1, "classes": 10, "stage": 2}
PLANS: dict[str, dict[str, Any]] = {
    "paper's way": {"group": "all", "chunk": "all"},
    "chunk-major": {"group": 2, "chunk": 2},
    "layer-major, a chunk left over": {"group": "all", "chunk": 3},
    "cast": {"compute": "fp32", "group": "all", "chunk": 2},
    "cpu": {"placement": "cpu", "group": "all", "chunk": 2},
    "disk": {"placement": "disk", "group": "all", "chunk": 2},
    "nf4": {"storage": "nf4", "group": "all", "chunk": 2},
    "int8": {"storage": "int8", "group": 2, "chunk": 1},
    "offload and recompute": {"offload_activations": True, "recompute": 1, "chunk": 2},
}


def rows(trace: Trace) -> list[tuple[Any, ...]]:
    """All that an event says."""
    return [
        (
            e.change,
            e.step,
            e.phase,
            a.nbytes,
            a.device,
            a.step,
            a.phase,
            a.cause,
            a.module,
            a.op,
            a.shape,
            a.dtype,
            a.stream,
        )
        for e in trace.events
        for a in [e.allocation]
    ]


@pytest.mark.parametrize("name", PLANS)
def test_repeating_layers_leaves_the_trace_as_it_is(name: str) -> None:
    trial = Trial.from_json(json.dumps({**SMALL, "plan": {"compute": "bf16", **PLANS[name]}}))
    repeated, full = (trace_trial(trial, free_bytes=1 << 30, host=True, repeat=repeat) for repeat in (True, False))
    assert rows(repeated) == rows(full)
    assert len({event.allocation.module for event in full.events}) > 10


def in_child(engine: str, change: str) -> subprocess.CompletedProcess[str]:
    """A trace on four ranks of `engine`, after `change`, in a process of its own: events by bytes, stream, operator."""
    ds = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": int(engine[-1]), "reduce_bucket_size": 10**6, "overlap_comm": True}
        if engine != "fsdp"
        else {},
    }
    sharded = {"fsdp": True} if engine == "fsdp" else {"ds": ds}
    code = f"""
import json, sys
from unittest.mock import patch
from bigvivit.memory import {"fsdp" if engine == "fsdp" else "zero"} as module
from bigvivit.trial import Trial, trace_trial
def change(repeat=True):
    {change}
    return repeat
trace = trace_trial(Trial.from_json(sys.argv[1]), free_bytes=1 << 30, repeat=change())
print(json.dumps([(event.change, event.allocation.stream, event.allocation.op) for event in trace.events]))
"""
    cell = json.dumps({**SMALL, **sharded, "world": 4, "plan": {"compute": "fp32", "group": "all", "chunk": 2}})
    command = [sys.executable, "-W", "ignore", "-c", code, cell]
    return subprocess.run(
        command, check=False, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True
    )


def events(engine: str, change: str = "pass") -> Any:
    done = in_child(engine, change)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3", "zero2"])
def test_what_saves_time_leaves_the_trace_as_it_is(engine: str) -> None:
    partition = "module.deepspeed.runtime.zero.partition_parameters"
    whole = {
        "fsdp": "module.first_chunk = module._fsdp_param._chunk_with_empty",
        "zero3": f"module.gather_at_once = {partition}.AllGatherCoalescedHandle.wait; "
        "module.with_one_view = lambda gather: gather; "
        "module.reduce_at_once = module.deepspeed.runtime.zero.stage3.reduce_scatter_coalesced",
        "zero2": "pass",
    }[engine]
    short, full = events(engine), events(engine, f"{whole}; repeat = False")
    assert sorted(event[:2] for event in short) == sorted(event[:2] for event in full)


SIDE_STREAMS = {
    "fsdp": [{"aten.empty.memory_format"}, {"c10d::_allgather_base_"}, {"c10d::_reduce_scatter_base_"}],
    "zero2": [{"aten.cat.default"}],
    "zero3": [{"aten.empty.memory_format"}, {"aten.new_empty.default", "c10d::_reduce_scatter_base_"}],
}
"""What takes memory on each stream beside the program's own: copies in, gathers, reductions; buckets of gradients; and
ZeRO-3's gathers and reductions."""


@pytest.mark.slow
@pytest.mark.parametrize("engine", SIDE_STREAMS)
def test_gathers_and_reductions_take_memory_on_streams_of_their_own(engine: str) -> None:
    found: dict[int, set[str]] = {}
    for _, stream, op in events(engine):
        found.setdefault(stream, set()).add(op)
    assert sorted(found) == list(range(len(SIDE_STREAMS[engine]) + 1))
    for number, ops in enumerate(SIDE_STREAMS[engine], start=1):
        assert ops <= found[number]
        assert not any(op.startswith(("aten.mm", "aten.addmm")) for op in found[number])


ASKED_UNDER = {
    "assert_ints_same_as_other_ranks": "zero3",
    "build_shm_op": "zero2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED_UNDER)
def test_deepspeed_still_asks_for_each_answer(name: str) -> None:
    """A release that asks no more fails here: then the answer has to go. One that asks for more fails everywhere."""
    done = in_child(ASKED_UNDER[name], f"module.FAKE_ANSWERS[{name!r}] = lambda *_, **__: {{}}['asked for {name}']")
    assert done.returncode != 0
    assert f"asked for {name}" in done.stderr


@pytest.mark.slow
def test_every_answer_is_tested() -> None:
    done = in_child("zero2", "sys.exit(' '.join(sorted(module.FAKE_ANSWERS)))")
    assert done.stderr.split()[-len(ASKED_UNDER) :] == sorted(ASKED_UNDER)
