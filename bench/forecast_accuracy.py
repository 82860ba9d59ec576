"""How far traced peaks are from the CPU allocator's own count: `python bench/forecast_accuracy.py`.

Small towers of every family, with the operators of the large ones. Plain cells run one after the other in this process,
on one thread; those of two ranks (`--ranks 2`) run in processes of their own, and their collectives go through gloo.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bigvivit.model.catalog import PUBLISHED, SIZES
from bigvivit.processes import run_ranks
from bigvivit.training.report import run_bench, write_report
from bigvivit.trial import Trial, shorten, trace_trial
from bigvivit.trial_run import locate_peak

ROOT = Path(__file__).resolve().parents[1]
FP32 = {"compute": "fp32", "group": "all", "chunk": 2}
FROZEN: dict[str, dict[str, Any]] = {
    "paper's way": {"plan": {**FP32, "chunk": "all"}},
    "chunk-major": {"plan": {**FP32, "group": 2}},
    "layer-major": {"plan": FP32},
    "CPU": {"plan": {**FP32, "placement": "cpu"}},
    "disk": {"plan": {**FP32, "placement": "disk"}},
    "nf4": {"plan": {**FP32, "storage": "nf4"}},
    "int8": {"plan": {**FP32, "storage": "int8"}},
    "recompute": {"plan": {**FP32, "recompute": 1}},
    "activations on host": {"plan": {**FP32, "offload_activations": True}},
    "bf16 masters": {"plan": {**FP32, "masters": "bf16"}},
    "adamw, 8 bits": {"plan": FP32, "optimizer": "adamw8bit"},
}
TRAINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "adamw": {"optimizer": "adamw"},
    "sgd, 8 bits": {"optimizer": "sgd8bit"},
    "adamw, 8 bits": {"optimizer": "adamw8bit"},
    "recompute": {"plan": {"recompute": 1}},
    "every second block": {"plan": {"recompute": 2}},
    "activations on host": {"plan": {"offload_activations": True}},
    "bf16 masters": {"plan": {"masters": "bf16"}},
}
FAMILIES = {
    "ViT": SIZES["vit-h"],
    "ViT-MAE": PUBLISHED["facebook/vit-mae-huge"].config,
    "I-JEPA": PUBLISHED["facebook/ijepa_vith14_1k"].config,
    "CLIP": PUBLISHED["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"].config,
    "SigLIP": PUBLISHED["google/siglip2-giant-opt-patch16-256"].config,
    "EVA": PUBLISHED["Salesforce/blip2-opt-2.7b"].config,
    "DINOv2": PUBLISHED["facebook/dinov2-giant"].config,
    "DINOv2 with registers": PUBLISHED["facebook/dinov2-with-registers-giant"].config,
    "DINOv3": PUBLISHED["facebook/dinov3-vith16plus-pretrain-lvd1689m"].config,
    "AIMv2": PUBLISHED["apple/aimv2-huge-patch14-224"].config,
}
LAYERS, WIDTH, HEADS, FRAMES = 3, 384, 6, 8
CLIP = {"frames": FRAMES, "size": 224, "temporal_depth": 2}
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
    """Compare forecast and measured peaks, cell by cell; a run that was interrupted goes on."""

    ranks: Literal[1, 2] = 1
    """Cells of so many ranks; each number has a report of its own."""
    results: Path = ROOT / "bench" / "results"
    """Folder of reports, and of the rows so far."""


def list_cells(towers: Path) -> dict[str, dict[str, Any]]:
    """Name to trial; `towers` is the folder of the small towers."""
    cells: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        for stage, plans in ((2, FROZEN), (1, TRAINED)):
            for name, settings in plans.items():
                tower = str(towers / family)
                cells[f"{family}, stage {stage}, {name}"] = {**CLIP, "tower": tower, "stage": stage, **settings}
    for optimizer in ("sgd", "adamw"):
        for engine in ("fsdp", "zero1", "zero2", "zero3", "ddp"):
            for stage in (2, 1):
                cells[f"ViT, stage {stage}, {engine} on 2 ranks, {optimizer}"] = {
                    **CLIP, "tower": str(towers / "ViT"), "stage": stage, "world": 2, "optimizer": optimizer,
                    "plan": FP32 if stage == 2 else {}, "fsdp": engine == "fsdp",
                    "ds": deepspeed(int(engine[-1])) if engine.startswith("zero") else None,
                }  # fmt: skip
    return cells


def write_towers(folder: Path) -> None:
    """A small tower of every family: its configuration alone, since weights are random."""
    for family, config in FAMILIES.items():
        values = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "image_size": CLIP["size"]}
        if hasattr(config, "intermediate_size"):
            values["intermediate_size"] = 4 * WIDTH
        small = shorten(config, LAYERS).to_dict() | values
        type(config).from_dict(small).save_pretrained(folder / family)


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
            "reduce_bucket_size": 10**6,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 10**8,
            "stage3_max_reuse_distance": 0,
        },
    }


def compare(cell: dict[str, Any]) -> dict[str, Any]:
    """One cell, measured and traced."""
    text = json.dumps(cell)
    if cell.get("world", 1) > 1:
        ranks = run_ranks(["-m", "bigvivit.trial_run", text], cell["world"])
        most = max(ranks, key=lambda rank: rank["peak_bytes"])
        measured, operator = most["peak_bytes"], most["peak_operator"]
        traced = run_ranks(["-c", TRACE, text])[0]
        forecast, seconds = traced["peak_bytes"], traced["seconds"]
    else:
        trial = Trial.from_json(text)
        start = time.perf_counter()
        forecast = trace_trial(trial, free_bytes=1 << 34).peak_bytes()
        seconds = time.perf_counter() - start
        measured, operator = locate_peak(trial)
    return {
        "evidence": "measured",
        "measured_peak_bytes": measured,
        "forecast_peak_bytes": forecast,
        "error_percent": round(100 * (forecast / measured - 1), 4),
        "unseen_bytes": measured - forecast,
        "operator_at_measured_peak": operator,
        "trace_seconds": round(seconds, 2),
    }


def main(arguments: Arguments) -> None:
    """Measure, trace, compare, write."""
    torch.set_num_threads(1)
    arguments.results.mkdir(parents=True, exist_ok=True)
    bench, limit = {1: ("forecast_accuracy_one_rank", 0.1), 2: ("forecast_accuracy_two_ranks", 1.0)}[arguments.ranks]
    kept = arguments.results / f"{bench}.partial.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {row["cell"] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        write_towers(Path(folder))
        for name, cell in list_cells(Path(folder)).items():
            if name not in done and cell.get("world", 1) == arguments.ranks:
                rows.append({"cell": name, **compare(cell)})
                with kept.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(f"{name}: {rows[-1]['error_percent']} %, {rows[-1]['operator_at_measured_peak']}", flush=True)
    settings = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, **CLIP, "classes": 400, "steps": 3}
    stem = write_report(arguments.results, bench, device=torch.device("cpu"), settings=settings, rows=rows)
    kept.unlink()
    errors = [abs(row["error_percent"]) for row in rows]
    print(f"{sum(error <= limit for error in errors)} of {len(errors)} cells within {limit} %, worst {max(errors)} %")
    print(f"wrote {stem}.json and .md")


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
