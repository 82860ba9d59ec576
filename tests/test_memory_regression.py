"""The gate: what each memory plan takes is, to the byte, what it took when somebody last looked.

Traces of the real step as for an accelerator; types, chunks and free memory are fixed, so that every machine traces the
same. Measured peaks beside them, within a tolerance, go into pytest-benchmark's `extra_info`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import bigvivit.memory.apply
from bench.frame_capacity import PLANS, TRAINED
from bigvivit import assemble
from bigvivit.config import OptimConfig
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.trace import Trace
from bigvivit.memory.ds_json import read_ds_json
from bigvivit.memory.fsdp import FsdpSharder
from bigvivit.memory.stream import FrozenTower, StreamedLayer
from bigvivit.testing import explain_growth, most_by_cause
from bigvivit.trial import Trial, trace_trial
from bigvivit.trial_run import measure_trial, run_trial
from bigvivit.units import GiB
from tests.launching import ROOT, environment

FROZEN: dict[str, dict[str, Any]] = {
    **PLANS,
    "int8": {"storage": "int8"},
    "recompute": {"recompute": 1},
    "activations on host": {"offload_activations": True},
    "bf16 masters": {"masters": "bf16"},
}
STAGE1: dict[str, dict[str, Any]] = {
    **TRAINED,
    "activations on host": {"offload_activations": True},
    "bf16 masters": {"masters": "bf16"},
}
TOWERS = ("vit-b", "vit-l", "vit-h", "vit-g")
CARD = "A100 80GB"
"""Whose kernels are traced."""


def build_cell(tower: str, stage: int, plan: dict[str, Any], **changes: Any) -> Trial:
    """Two layers over 16 frames, in chunks of 4 of 8 tubelets, every type said."""
    types: dict[str, Any] = {"autocast": "fp32"}
    if stage == 2:
        types |= {"compute": "bf16", "group": "all", "chunk": 4}
        if plan.get("group") == "chunk":
            plan = {**plan, "group": 4}
    values = {"stage": stage, "tower": tower, "frames": 16, "layers": 2, "temporal_depth": 1, "plan": {**types, **plan}}
    return Trial.from_json(json.dumps({**values, **changes}))


def trace(trial: Trial) -> Trace:
    return trace_trial(trial, free_bytes=GiB, host=True, card=find_accelerator(CARD), steps=2)


def cells(towers: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(build_cell(tower, stage, plan), id=f"{tower}-{stage}-{name}")
        for tower in towers
        for stage, plans in ((1, STAGE1), (2, FROZEN))
        for name, plan in plans.items()
    ]


@pytest.mark.parametrize("trial", cells(("vit-b", "vit-g")))
def test_two_layers_take_what_they_took(trial: Trial, memory_golden: Callable[..., None]) -> None:
    memory_golden(trace(trial))


@pytest.mark.slow
@pytest.mark.parametrize("trial", cells(TOWERS))
def test_whole_towers_take_what_they_took(trial: Trial, memory_golden: Callable[..., None]) -> None:
    memory_golden(trace(replace(trial, layers=None, temporal_depth=4)))


SHARDED = """
import json, sys
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.trial import Trial, trace_trial
trial, card = Trial.from_json(sys.argv[1]), find_accelerator(sys.argv[2])
print(json.dumps(trace_trial(trial, free_bytes=1 << 30, host=True, card=card).peak_bytes()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3", "zero3_offload"])
def test_a_rank_of_eight_takes_what_it_took(engine: str, stage: int, memory_golden: Callable[..., None]) -> None:
    """With the buckets of the shipped DeepSpeed files."""
    changes: dict[str, Any] = {"world": 8, "fsdp": engine == "fsdp"}
    if engine.startswith("zero"):
        optim = OptimConfig(name="sgd", batch_size=8, epochs=1, warmup_epochs=0)
        changes["ds"] = read_ds_json(ROOT / "ds_configs" / f"{engine}.json", optim, 8)
    text = build_cell("vit-g", stage, {}, **changes).to_json()
    words = [sys.executable, "-c", SHARDED, text, CARD]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory_golden(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", ["paper", "layer-major"])
def test_measured_by_the_cpu_allocator(name: str, memory_golden: Callable[..., None], benchmark: Any) -> None:
    trial = build_cell("vit-b", 2, {**FROZEN[name], "compute": "fp32"}, frames=8, size=112)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # kernels take scratch for each
    try:
        peak = benchmark.pedantic(measure_trial, args=(trial,), rounds=1)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info["peak_bytes"] = peak
    memory_golden(peak, tolerance=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["paper", "layer-major"])
def test_measured_on_cuda(name: str, memory_golden: Callable[..., None], benchmark: Any) -> None:
    """Recorded on the virtual GPU: a real one of the same name is held against it, to 2 %. No real one was here yet."""
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats()
    trial = build_cell("vit-b", 2, FROZEN[name])
    found = benchmark.pedantic(run_trial, args=(trial, 3, torch.device("cuda")), rounds=1)
    benchmark.extra_info["peak_bytes"] = int(found["peak_bytes"])
    memory_golden(int(found["peak_bytes"]), tolerance=0.02, on=torch.cuda.get_device_name())  # workspaces differ


def regress(trial: Trial, parts: dict[str, int], honest_peak: int) -> list[str]:
    """What the gate says of the trial as it is now."""
    regressed = trace(trial)
    assert regressed.peak_bytes() > honest_peak
    return explain_growth(parts, regressed)


def honest(plan: dict[str, Any]) -> tuple[Trial, dict[str, int], int]:
    trial = build_cell("vit-b", 2, plan)
    found = trace(trial)
    return trial, most_by_cause(found), found.peak_bytes()


def test_an_activation_that_is_kept_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = honest(FROZEN["layer-major"])
    build, kept = assemble.build_model, []

    def build_leaking(*args: Any, **options: Any) -> nn.Module:
        model: nn.Module = build(*args, **options)
        block = dict(model.named_modules())["temporal.layers.0"]
        forward = block.forward

        def leak(*inputs: Any) -> torch.Tensor:
            kept.append(forward(*inputs).repeat(1, 64, 1))
            return kept[-1][:, : inputs[0].shape[1]]

        block.forward = leak
        return model

    monkeypatch.setattr(assemble, "build_model", build_leaking)
    line = regress(*before)[0]
    assert "activations of temporal.layers.0 " in line
    assert int(line.split()[0].replace(",", "")) >= kept[0].nbytes


def test_a_layer_that_stays_gathered_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cast from what is stored, where FSDP2 would have gathered it."""
    before = honest({**FROZEN["layer-major"], "storage": "bf16", "compute": "fp32"})
    weights, left = StreamedLayer.weights, []

    def keep(layer: StreamedLayer, fetched: torch.Tensor | None) -> Any:
        found = weights(layer, fetched)
        if hasattr(layer.layer, "attention") and not left:
            left.append(found)
        return found

    monkeypatch.setattr(StreamedLayer, "weights", keep)
    lines = regress(*before)
    assert "fetched weights of tower.layers.0 " in lines[0], lines


def test_a_tower_that_gets_gradients_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = honest(FROZEN["paper"])
    monkeypatch.setattr(bigvivit.memory.apply, "freeze", lambda tower: None)
    monkeypatch.setattr(FrozenTower, "forward", FrozenTower.forward.__wrapped__)  # without no_grad
    lines = "\n".join(regress(*before))
    for cause in ("gradients", "activations"):
        assert f"{cause} of tower.layers.0 " in lines
        assert f"{cause} of tower.layers.1 " in lines


@pytest.mark.slow
def test_a_layer_that_fsdp2_leaves_gathered_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = build_cell("vit-b", 2, FROZEN["layer-major"], world=8, fsdp=True)
    found = trace(trial)
    units: list[nn.Module] = []

    def shard(self: FsdpSharder, unit: nn.Module) -> None:
        units.append(unit)
        fully_shard(unit, reshard_after_forward=len(units) != 2)  # the first after the embedding

    monkeypatch.setattr(FsdpSharder, "shard", shard)
    lines = regress(trial, most_by_cause(found), found.peak_bytes())
    assert " of tower.layers.0 " in lines[0], lines
