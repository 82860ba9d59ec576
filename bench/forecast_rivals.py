"""Forecasts of the same training steps by others, beside ours and what was measured: `python bench/forecast_rivals.py`.

torch's MemTracker and FSDPMemTracker run the same step on the same fake tensors; DeepSpeed's
estimate_zero3_model_states_mem_needs and accelerate's estimate-memory have formulas over the same weights. Every
forecast runs in a process of its own, one after the other, and its seconds do not count imports. `--big` adds ViT-g's
full step at 8 frames, one step of each, ours and MemTracker's in turn; and its stage 2 at 128 frames on 64 ranks by
each shipped way to share it out, as `bigvivit plan` traces it. Nobody measures those here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigvivit.config import OptimConfig
from bigvivit.forecast.fake import fake_ranks, fake_world
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import capacity, forecast_overhead
from bigvivit.memory.ds_json import read_ds_json
from bigvivit.processes import run_ranks
from bigvivit.training.report import run_bench, write_report
from bigvivit.training.step import train_step
from bigvivit.trial import Trial, build_trial, fake_engine, trace_trial

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {"tower": "vit-b", "layers": 4, "frames": 8, "temporal_depth": 2, "optimizer": "adamw"}
FP32 = {"compute": "fp32", "group": "all", "chunk": 2}
CELLS: dict[str, dict[str, Any]] = {
    "stage 1": {**SMALL, "stage": 1},
    "stage 2": {**SMALL, "stage": 2, "plan": FP32},
    "stage 1, recompute": {**SMALL, "stage": 1, "plan": {"recompute": 1}},
    "stage 1, FSDP2 on 2 ranks": {**SMALL, "stage": 1, "world": 2, "fsdp": True},
    "stage 2, FSDP2 on 2 ranks": {**SMALL, "stage": 2, "world": 2, "fsdp": True, "plan": FP32},
}
BIG = {"tower": "vit-g", "frames": 8, "stage": 1}
PLANNED: dict[str, Any] = {"tower": "vit-g", "frames": 128, "stage": 2, "world": 64, "plan": {"compute": "bf16"}}
CARD, WITHIN_S = "A100 80GB", 10.0
"""That it is planned for; and the target."""
FREE = 1 << 34


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare forecasts."""

    big: bool = False
    """Time ViT-g's full step too: minutes for MemTracker."""
    rounds: int = 3
    """Of these timings, ours and MemTracker's in turn."""
    only: str = ""
    """Cells whose name holds this."""
    results: Path = ROOT / "bench" / "results"
    """Folder of reports."""


@contextmanager
def built(trial: Trial) -> Iterator[tuple[Any, Any]]:
    """The trial's engine and batch on fake tensors."""
    ranks = fake_ranks(trial.world, 0, always=trial.fsdp)
    with ranks, fake_engine(trial), fake_world(host=False):
        yield build_trial(trial, torch.device("cpu"), fake=True, free_bytes=FREE)


class Values(TorchDispatchMode):
    """Says 1 where the step reads a value, as our tracker does: fake tensors have none, and others stop there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


def ours(trial: Trial, steps: int) -> int:
    """The trace, with causes and modules."""
    return trace_trial(trial, free_bytes=FREE, steps=steps).peak_bytes()


def planned(trial: Trial, steps: int) -> int:
    """The same for a card."""
    card = find_accelerator(CARD)
    free = capacity(card, forecast_overhead(card, ranks=trial.world))[1]
    return trace_trial(trial, free_bytes=free, host=True, card=card, steps=steps).peak_bytes()


def mem_tracker(trial: Trial, steps: int) -> int:
    """torch.distributed._tools.mem_tracker."""
    from torch.distributed._tools.mem_tracker import MemTracker

    with built(trial) as (engine, batch):
        tracker = MemTracker()
        tracker.track_external(engine.module, engine.optimizer, batch.clips)
        with tracker, Values():
            for _ in range(steps):
                tracker.reset_mod_stats()  # else it stops at a module's second forward
                train_step(engine, [batch])
        return read_peak(tracker)


def fsdp_mem_tracker(trial: Trial, steps: int) -> int:
    """torch.distributed._tools.fsdp2_mem_tracker."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    with built(trial) as (engine, batch):
        tracker = FSDPMemTracker(engine.module, engine.optimizer)
        tracker.track_inputs((batch.clips,))
        with tracker, Values():
            for _ in range(steps):
                tracker.reset_mod_stats()  # else it stops at a module's second forward
                train_step(engine, [batch])
        return read_peak(tracker)


def read_peak(tracker: Any) -> int:
    """Bytes, of all devices: all stand on the CPU."""
    return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())


def whole_model(trial: Trial) -> nn.Module:
    """All weights of the trial, in no engine."""
    return build_trial(
        Trial(**{**vars(trial), "world": 1, "fsdp": False}), torch.device("cpu"), fake=True, free_bytes=FREE
    )[0].module


def deepspeed_states(trial: Trial, steps: int) -> int:
    """DeepSpeed's estimator: bytes of a GPU without offload."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    with fake_world(host=False):
        model = whole_model(trial)
        sizes = [sum(p.numel() for p in part.parameters(recurse=False)) for part in model.modules()]
    _, gpu, _ = estimate_zero3_model_states_mem_needs(
        sum(sizes), max(sizes), trial.world, cpu_offload=False, cpu_offload_params=False
    )
    return int(gpu)


def accelerate_estimate(trial: Trial, steps: int) -> int:
    """accelerate estimate-memory's row `Training using Adam`, in fp32."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    with fake_world(host=False):
        total, _ = calculate_maximum_sizes(whole_model(trial))
    return int(max(estimate_training_usage(total, "float32").values()))


METHODS = {
    "bigvivit": ours,
    "MemTracker": mem_tracker,
    "FSDPMemTracker": fsdp_mem_tracker,
    "DeepSpeed estimator": deepspeed_states,
    "accelerate estimate-memory": accelerate_estimate,
}


def forecast(method: str, cell: dict[str, Any], steps: int) -> dict[str, Any]:
    """In a process of its own; how it failed where it does."""
    words = ["-W", "ignore", str(Path(__file__)), "--one", method, json.dumps(cell), str(steps)]
    return run_ranks(words, environment={"PYTHONPATH": str(ROOT)})[0]


def one(method: str, cell: str, steps: str) -> None:
    """What `forecast` starts."""
    trial = Trial.from_json(cell)
    # Imports are nobody's time.
    import torch.distributed._tools.fsdp2_mem_tracker  # noqa: F401

    import bigvivit.memory.fsdp

    if trial.ds is not None:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 - in the middle of its start

        import bigvivit.memory.zero  # noqa: F401

    start = time.perf_counter()
    try:
        found: dict[str, Any] = {
            "forecast_peak_bytes": {**METHODS, "bigvivit plan": planned}[method](trial, int(steps))
        }
    except Exception as error:  # whatever others fail with is a finding
        if method.startswith("bigvivit"):
            raise
        found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    print(json.dumps({**found, "seconds": round(time.perf_counter() - start, 2)}), flush=True)
    os._exit(0)


def methods_for(cell: dict[str, Any]) -> list[str]:
    """FSDP's tracker is for FSDP, the other for the rest."""
    return [name for name in METHODS if name != ("MemTracker" if cell.get("fsdp") else "FSDPMemTracker")]


def list_shipped() -> dict[str, dict[str, Any]]:
    """Every way to share a step out that this repository ships a configuration or an option for."""
    shipped: dict[str, dict[str, Any]] = {"DDP": {}, "FSDP2": {"fsdp": True}}
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        shipped[path.name] = {"ds": read_ds_json(path, OptimConfig(batch_size=PLANNED["world"]), PLANNED["world"])}
    return shipped


def main(arguments: Arguments) -> None:
    """Measure, forecast, compare, write."""
    rows: list[dict[str, Any]] = []
    for name, cell in CELLS.items():
        if arguments.only not in name:
            continue
        ranks = run_ranks(["-m", "bigvivit.trial_run", json.dumps(cell)], cell.get("world", 1))
        measured = max(rank["peak_bytes"] for rank in ranks)
        for method in methods_for(cell):
            row = {"cell": name, "method": method, "evidence": "measured", "measured_peak_bytes": measured}
            row |= forecast(method, cell, 3)
            if "forecast_peak_bytes" in row:
                row["error_percent"] = round(100 * (row["forecast_peak_bytes"] / measured - 1), 2)
            rows.append(row)
            print(f"{name}, {method}: {row.get('error_percent', row.get('failed'))} %, {row['seconds']} s", flush=True)
    for number in range(arguments.rounds if arguments.big else 0):
        for method in ("bigvivit", "MemTracker"):
            row = {"cell": f"ViT-g, stage 1, 8 frames, round {number + 1}", "method": method, "evidence": "forecast"}
            rows.append(row | forecast(method, BIG, 1))
            print(f"{rows[-1]['cell']}, {method}: {rows[-1]['seconds']} s", flush=True)
    for name, sharded in list_shipped().items() if arguments.big else ():
        row = {
            "cell": f"ViT-g, stage 2, 128 frames, 64 ranks, {name}",
            "method": "bigvivit plan",
            "evidence": "forecast",
        }
        row |= forecast("bigvivit plan", {**PLANNED, **sharded}, 3)
        row["target"] = f"{'met' if row['seconds'] <= WITHIN_S else 'not met'}: within {WITHIN_S:.0f} s"
        rows.append(row)
        print(f"{row['cell']}: {row['seconds']} s, {row['target']}", flush=True)
    settings = {
        "cells": CELLS,
        "big": BIG,
        "planned": {**PLANNED, "card": CARD},
        "steps": "3, of ViT-g 1",
        "threads": 1,
    }
    stem = write_report(arguments.results, "forecast_rivals", device=torch.device("cpu"), settings=settings, rows=rows)
    draw(rows, stem.with_name(stem.name + ".png"))
    print(f"wrote {stem}.json, .md and .png")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Error of each method in each cell, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    compared = [row for row in rows if "error_percent" in row]
    cells = list(dict.fromkeys(row["cell"] for row in compared))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for place, method in enumerate(METHODS):
        own = {row["cell"]: max(abs(row["error_percent"]), 1e-3) for row in compared if row["method"] == method}
        spots = [index + 0.16 * (place - 2) for index, cell in enumerate(cells) if cell in own]
        axes.bar(spots, [own[cell] for cell in cells if cell in own], width=0.15, label=method, bottom=1e-4)
    axes.set_yscale("log")
    axes.set_ylabel("error of the peak, % (0.001 or less is drawn as 0.001)")
    axes.set_xticks(range(len(cells)), [cell.replace(", ", ",\n") for cell in cells])
    axes.legend(fontsize="small")
    axes.set_title("Forecast peak against the CPU allocator's own count")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
    else:
        run_bench(main, Arguments, __doc__)
