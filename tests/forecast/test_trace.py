"""Traces on fake tensors against what really was allocated."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.cuda._memory_viz

from bigvivit.forecast.memory_viz import write_snapshot
from bigvivit.forecast.snapshot import read_trace
from bigvivit.memory.plan import MemoryPlan
from bigvivit.trial import Trial, trace_trial
from bigvivit.trial_run import measure_trial
from tests.launching import ROOT, environment, free_port

SMALL: dict[str, Any] = {"tower": "vit-b", "layers": 2, "frames": 8, "size": 112, "temporal_depth": 1, "classes": 10}
PLENTY = 1 << 34
FP32 = {"compute": "fp32", "group": "all", "chunk": 2}
CELLS: dict[str, dict[str, Any]] = {
    "paper": {"stage": 2, "plan": {**FP32, "chunk": "all"}},
    "chunk-major": {"stage": 2, "plan": {**FP32, "group": 2}},
    "cpu": {"stage": 2, "plan": {**FP32, "placement": "cpu"}, "optimizer": "adamw"},
    "disk": {"stage": 2, "plan": {**FP32, "placement": "disk"}},
    "accumulate": {"stage": 2, "plan": FP32, "accumulate": 3},
    "nf4": {"stage": 2, "plan": {**FP32, "storage": "nf4"}},
    # Larger images: of small ones the peak is in a convolution's backward, in scratch that only its kernel knows of.
    "stage 1": {"stage": 1, "size": 224},
    "recompute": {"stage": 1, "size": 224, "plan": {"recompute": 1}, "droplayer": 0.3},
    "sgd8bit": {"stage": 2, "plan": {**FP32, "chunk": "all"}, "optimizer": "sgd8bit"},
    "adamw8bit": {"stage": 1, "size": 224, "optimizer": "adamw8bit"},
    "fused": {"stage": 1, "size": 224, "optimizer": "adamw", "fused": True},
    "averages": {"stage": 1, "size": 224, "optimizer": "adamw", "ema": 0.9},
    "bank with averages": {"stage": 2, "plan": {**FP32, "chunk": "all"}, "depths": [1, 2], "ema": 0.9},
    "bank": {"stage": 2, "plan": {**FP32, "chunk": "all"}, "depths": [1, 2, 1], "optimizer": "adamw"},
    "cached": {"stage": 2, "plan": FP32, "cached": True, "clips": 16, "optimizer": "adamw"},
    "patches": {"stage": 2, "plan": {**FP32, "chunk": "all"}, "patch_grid": 4},
    "cached patches": {"stage": 2, "plan": FP32, "cached": True, "clips": 16, "patch_grid": 2, "depths": [2, 1]},
    "cached bank": {"stage": 2, "plan": FP32, "cached": True, "clips": 16, "depths": [2, 1, 1]},
    "offload": {"stage": 1, "size": 224, "plan": {"offload_activations": True}, "optimizer": "adamw"},
}


def build(cell: dict[str, Any]) -> Trial:
    return Trial.from_json(json.dumps({**SMALL, **cell}))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With more, a convolution's backward takes scratch for each, which no trace sees, and here makes the peak."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CELLS)
def test_the_peak_is_the_cpu_allocators_own(name: str) -> None:
    trial = build(CELLS[name])
    trace = trace_trial(trial, free_bytes=PLENTY)
    assert trace.peak_bytes() == pytest.approx(measure_trial(trial), rel=1e-3)
    composition = trace.composition()
    assert sum(composition.values()) == trace.peak_bytes()
    assert "optimizer state" in composition


SHARDED: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "zero2": {"ds": {"stage": 2, "reduce_bucket_size": 10**7}},
    # Nothing is fetched ahead: gloo's threads free what they gathered when they come to it, so no two runs are alike.
    "zero3": {"ds": {"stage": 3, "reduce_bucket_size": 10**7, "stage3_prefetch_bucket_size": 0}},
}
ON_RANKS = """
import json, sys
from bigvivit.trial import Trial, trace_trial
trace = trace_trial(Trial.from_json(sys.argv[1]), free_bytes=1 << 34)
print(json.dumps({"peak_bytes": trace.peak_bytes(), "causes": trace.composition()}))
"""
TWICE = """
import json, sys
from bigvivit.trial import Trial, trace_trial
traces = [trace_trial(Trial.from_json(sys.argv[1]), free_bytes=1 << 34) for _ in range(2)]
print(json.dumps({"events": [[event.change for event in trace.events if event.step > 0] for trace in traces]}))
"""


def run(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT), **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors[-3000:]
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["fsdp", "ddp", "zero2", "zero3"])
def test_each_of_two_ranks_takes_what_was_forecast(name: str, stage: int) -> None:
    cell: dict[str, Any] = {**SMALL, "stage": stage, "world": 2, **SHARDED[name]}
    if stage == 2:
        cell["plan"] = FP32
    else:
        cell["size"] = 224  # see CELLS
    if "ds" in cell:
        cell["ds"] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {**cell["ds"], "stage3_param_persistence_threshold": 0},
        }
    text, port = json.dumps(cell), str(free_port())
    ranks = [
        run(
            ["-m", "bigvivit.trial_run", text],
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in range(2)
    ]  # fmt: skip
    real = max(answer(process)["peak_bytes"] for process in ranks)
    forecast = answer(run(["-c", ON_RANKS, text]))
    assert forecast["peak_bytes"] == pytest.approx(real, rel=0.01)
    assert sum(forecast["causes"].values()) == forecast["peak_bytes"]


def test_the_first_trace_of_a_process_is_like_the_second() -> None:
    """DTensor keeps the shapes that it has learnt, and learning them takes no memory."""
    trial = json.dumps({**SMALL, "stage": 2, "world": 8, **SHARDED["fsdp"]})
    first, second = answer(run(["-c", TWICE, trial]))["events"]
    assert first == second


def test_recompute_shows_in_the_activations() -> None:
    """Of each block only its input waits for the backward."""

    def most(plan: MemoryPlan) -> int:
        trace = trace_trial(Trial(stage=1, tower="vit-b", layers=6, frames=8, plan=plan), free_bytes=PLENTY)
        live = peak = 0
        for event in trace.events:
            if event.allocation.cause == "activations":
                live += event.change
                peak = max(peak, live)
        return peak

    assert most(MemoryPlan()) > 5 * most(MemoryPlan(recompute=1))


def test_frames_cost_hidden_states_in_layer_major_order_and_nothing_chunk_by_chunk() -> None:
    def peak(frames: int, group: Any) -> int:
        plan = MemoryPlan(compute="bf16", group=group, chunk=4, placement="disk")
        trial = Trial(stage=2, tower="vit-g", layers=2, frames=frames, plan=plan, temporal_depth=1)
        return trace_trial(trial, free_bytes=PLENTY, host=True).peak_bytes()

    hidden = 257 * 1408 * 2  # a tubelet of ViT-g between two layers, in bf16
    more = (128 - 64) // 2
    grown = peak(128, "all") - peak(64, "all")
    assert hidden * more <= grown <= 1.1 * hidden * more
    assert peak(128, 4) - peak(64, 4) < 0.05 * hidden * more


@pytest.mark.parametrize("plan", [{"group": "all"}, {"group": 2}, {"group": "all", "placement": "cpu"}])
def test_no_more_than_a_chunk_of_frames_is_on_the_device(plan: dict[str, Any]) -> None:
    """Clips stay on the host as bytes; neither these nor floats of all frames are ever on the device."""
    trial = Trial.from_json(json.dumps({**SMALL, "tower": "vit-demo", "layers": None, "size": 48, "stage": 2,
                                        "plan": {**plan, "compute": "fp32", "chunk": 2}}))  # fmt: skip
    trace = trace_trial(trial, free_bytes=PLENTY, host=True)
    images = [e.allocation for e in trace.events if e.change > 0 and e.allocation.shape[-2:] == (48, 48)]
    assert {a.dtype for a in images if a.device == "cpu"} == {torch.uint8, torch.float32}
    assert max(a.shape[0] for a in images if a.device == "cpu") == 2
    assert [a.dtype for a in images if a.device == "host"] == [torch.uint8]  # the clip, of all eight frames


def test_memory_viz_reads_it_and_nothing_in_it_is_code(tmp_path: Path) -> None:
    trial = Trial(stage=2, tower="vit-demo", size=48, frames=8, temporal_depth=1, plan=MemoryPlan(compute="bf16"))
    trace = trace_trial(trial, free_bytes=PLENTY, host=True)
    write_snapshot(trace, tmp_path / "snapshot.pickle")
    read = read_trace(tmp_path / "snapshot.pickle")  # refuses a pickle that names code
    live = peak = 0
    for event in read.events:
        live += {"a": 1, "f": -1}.get(event.kind, 0) * event.size
        peak = max(peak, live)
    assert peak == max(trace.peak_bytes(), trace.building_peak_bytes())
    assert live == trace.left_bytes()
    data = pickle.loads((tmp_path / "snapshot.pickle").read_bytes())
    assert "snapshot.pickle" in torch.cuda._memory_viz.trace_plot(data)


def test_steps_phases_and_devices_are_told_apart() -> None:
    trial = Trial(stage=2, tower="vit-demo", size=48, frames=8, temporal_depth=1, optimizer="adamw")
    trace = trace_trial(trial, free_bytes=PLENTY, host=True)
    assert {event.step for event in trace.events} == {0, 1, 2, 3}
    assert {event.phase for event in trace.events if event.step == 2} == {"forward", "backward", "optimizer"}
    states = [e.step for e in trace.events if e.allocation.cause == "optimizer state" and e.change > 0]
    assert set(states) == {1}
    assert {event.allocation.device for event in trace.events} == {"cpu", "host"}


def test_ranks_stream_a_tower_as_one_process_does() -> None:
    """How much memory is free is what the trace was told, also where ranks agree on the least of all."""

    def gathers(plan: MemoryPlan) -> int:
        trial = Trial(stage=2, tower="vit-demo", size=48, frames=32, temporal_depth=1, plan=plan, fsdp=True, world=8)
        trace = trace_trial(trial, free_bytes=PLENTY, steps=1)
        return sum(event.allocation.op == "c10d::_allgather_base_" for event in trace.events)

    assert gathers(MemoryPlan(compute="bf16")) == gathers(MemoryPlan(compute="bf16", group="all"))
