"""How far traced peaks are from the CPU allocator's own count: `python bench/forecast_accuracy.py`.

Each cell runs in a process of its own, the real steps first. On two ranks collectives go through gloo.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.progress import track

from bigvivit.processes import run_ranks
from bigvivit.training.report import write_report

ROOT = Path(__file__).resolve().parents[1]
FP32 = {"compute": "fp32", "group": "all", "chunk": 2}
FROZEN: dict[str, dict[str, Any]] = {
    "paper's way": {**FP32, "chunk": "all"},
    "chunk-major": {**FP32, "group": 2},
    "layer-major": FP32,
    "CPU": {**FP32, "placement": "cpu"},
    "disk": {**FP32, "placement": "disk"},
    "nf4": {**FP32, "storage": "nf4"},
    "int8": {**FP32, "storage": "int8"},
    "recompute": {**FP32, "recompute": 1},
    "activations on host": {**FP32, "offload_activations": True},
    "bf16 masters": {**FP32, "masters": "bf16"},
}
TRAINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": {"recompute": 1},
    "every second block": {"recompute": 2},
    "activations on host": {"offload_activations": True},
    "bf16 masters": {"masters": "bf16"},
}
TOWERS = {
    "ViT": "vit-b",
    "CLIP": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "DINOv2": "facebook/dinov2-giant",
    "DINOv3": "facebook/dinov3-vith16plus-pretrain-lvd1689m",
    "SigLIP": "google/siglip2-giant-opt-patch16-256",
}
LAYERS = 2
TRACE = """
import sys, json, time
from bigvivit.trial import Trial, trace_trial
trial = Trial.from_json(sys.argv[1])
start = time.perf_counter()
trace = trace_trial(trial, free_bytes=1 << 34)
print(json.dumps({"peak_bytes": trace.peak_bytes(), "seconds": time.perf_counter() - start}))
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare forecast and measured peaks, cell by cell."""

    only: str = ""
    """Cells whose name holds this."""
    results: Path = ROOT / "bench" / "results"
    """Folder of reports."""


def list_cells() -> dict[str, dict[str, Any]]:
    """Name to trial."""
    cells: dict[str, dict[str, Any]] = {}
    for family, tower in TOWERS.items():
        size = 256 if family == "SigLIP" else 224
        common = {"tower": tower, "layers": LAYERS, "size": size, "temporal_depth": 1}
        for name, plan in FROZEN.items():
            cells[f"{family}, stage 2, {name}"] = {**common, "stage": 2, "frames": 8, "plan": plan}
        for name, plan in TRAINED.items():
            cells[f"{family}, stage 1, {name}"] = {**common, "stage": 1, "frames": 8, "plan": plan}
        cells[f"{family}, stage 1, adamw"] = {**common, "stage": 1, "frames": 8, "optimizer": "adamw"}
    for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3"):
        for stage in (1, 2):
            for optimizer in ("sgd", "adamw"):
                cells[f"ViT, stage {stage}, {engine} on 2 ranks, {optimizer}"] = {
                    "tower": "vit-b", "layers": 3, "temporal_depth": 2, "stage": stage, "frames": 8, "world": 2,
                    "optimizer": optimizer, "plan": FP32 if stage == 2 else {}, "fsdp": engine == "fsdp",
                    "ds": deepspeed(int(engine[-1])) if engine.startswith("zero") else None,
                }  # fmt: skip
    return cells


def deepspeed(stage: int) -> dict[str, Any]:
    """A configuration that fetches nothing ahead: gloo's threads free what was gathered when they come to it, so that
    with prefetching no two measured runs are alike."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 10**7,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 10**8,
            "stage3_max_reuse_distance": 0,
        },
    }


def main(arguments: Arguments) -> None:
    """Measure, trace, compare, write."""
    rows = []
    cells = {name: cell for name, cell in list_cells().items() if arguments.only in name}
    for name, cell in track(cells.items(), "cells"):
        text = json.dumps(cell)
        measured = [answer["peak_bytes"] for answer in run_ranks(["-m", "bigvivit.trial", text], cell.get("world", 1))]
        forecast = run_ranks(["-c", TRACE, text])[0]
        rows.append(
            {
                "cell": name,
                "evidence": "measured",
                "measured_peak_bytes": max(measured),
                "least_rank_peak_bytes": min(measured),
                "forecast_peak_bytes": forecast["peak_bytes"],
                "error_percent": round(100 * (forecast["peak_bytes"] / max(measured) - 1), 4),
                "trace_seconds": round(forecast["seconds"], 2),
            }
        )
        if abs(rows[-1]["error_percent"]) > 0.1:
            print(f"{name}: {rows[-1]['error_percent']} %")
    settings = {"layers": LAYERS, "classes": 400, "steps": 3, "towers": TOWERS}
    stem = write_report(
        arguments.results, "forecast_accuracy", device=torch.device("cpu"), settings=settings, rows=rows
    )
    within = [abs(row["error_percent"]) for row in rows]
    print(f"{sum(error <= 0.1 for error in within)} of {len(rows)} cells within 0.1 %, "
          f"{sum(error <= 1 for error in within)} within 1 %; wrote {stem}.json and .md")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
