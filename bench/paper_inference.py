"""Which assumptions about the paper's own runs explain the frames it could train on: `python bench/paper_inference.py`.

The paper gives six thresholds (§4.8, Table 4) and not what they depend on: element types, recompute, optimizer, what
was sharded, the temporal transformer's depth, frames per tubelet, what was kept for frozen weights, how attention ran.
Every point of a grid over these is forecast by tracing the training step, and the thresholds it reproduces are counted.
This is inference about runs of others, from PyTorch's memory; XLA's fusion and layouts are not modelled.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import capacity, forecast_overhead
from bigvivit.forecast.trace import Trace
from bigvivit.model.towers import build_hf_model, resolve_tower
from bigvivit.training.report import run_bench, write_report
from bigvivit.trial import Trial, trace_trial
from bigvivit.units import format_bytes

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("vit-b", "vit-l")
"""Which of them §4.8 ran on eight cards is not said."""
THRESHOLDS: dict[str, tuple[str, int, str, int, int | None]] = {
    "ViViT-H": ("vit-h", 1, "TPU v3", 96, 128),
    "SFA-ViViT-H": ("vit-h", 2, "TPU v3", 128, None),
    "ViViT-g": ("vit-g", 1, "TPU v3", 8, 16),
    "SFA-ViViT-g": ("vit-g", 2, "TPU v3", 48, 64),
    "ViViT on 12 GB": ("small", 1, "2080 Ti", 16, 32),
    "SFA-ViViT on 12 GB": ("small", 2, "2080 Ti", 80, 96),
}
"""Tower, stage, hardware, frames that fit, and the next number of Table 4's columns, which does not."""
RANKS = {"TPU v3": 64, "2080 Ti": 8}
PRECISIONS: dict[str, dict[str, str]] = {
    "fp32": {"storage": "fp32", "compute": "fp32", "autocast": "fp32"},
    "bf16 products": {"storage": "fp32", "compute": "bf16", "autocast": "bf16"},
    "bf16 throughout": {"storage": "bf16", "compute": "bf16", "autocast": "bf16", "masters": "bf16"},
}
TRACED: dict[str, tuple[Any, ...]] = {
    "precision": tuple(PRECISIONS),
    "recompute": (False, True),
    "attention": ("materialised", "fused"),
    "temporal_depth": (4, 24),
    "tubelet": (2, 4),
}
"""What decides which tensors there are."""
STEPS = 2
"""Traced: momentum is there from the second on."""
WEIGHED: dict[str, tuple[Any, ...]] = {
    "optimizer": ("momentum", "adam"),
    "sharded": ("nothing", "optimizer state", "everything"),
    "kept_for_frozen": ("nothing", "gradients", "optimizer state", "both"),
    "small": SMALL,
}
"""What only changes how much the tensors of a trace weigh."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Trace the grid and count."""

    results: Path = ROOT / "bench" / "results"
    """Folder of reports."""


def list_traces() -> Iterator[tuple[str, dict[str, Any], str, int, int]]:
    """(key, assumptions, tower, stage, frames) of every step that has to be traced."""
    steps = []
    for tower, stage, _, most, next_most in THRESHOLDS.values():
        for name in SMALL if tower == "small" else (tower,):
            steps += [(name, stage, frames) for frames in (most, next_most) if frames is not None]
    for values in itertools.product(*TRACED.values()):
        assumed = dict(zip(TRACED, values, strict=True))
        for tower, stage, frames in steps:
            yield json.dumps([*values, tower, stage, frames]), assumed, tower, stage, frames


def trace_peaks(assumed: dict[str, Any], tower: str, stage: int, frames: int) -> dict[str, int]:
    """Peak bytes for each optimizer and way of sharding, and the tower's own weights."""
    plan: dict[str, Any] = {**PRECISIONS[assumed["precision"]], "recompute": int(assumed["recompute"])}
    if stage == 2:
        plan |= {"group": "all", "chunk": "all"}
    else:
        plan.pop("storage")
        plan.pop("compute")
    trial = Trial.from_json(
        json.dumps(
            {
                "stage": stage, "tower": tower, "frames": frames, "tubelet": assumed["tubelet"], "plan": plan,
                "temporal_depth": assumed["temporal_depth"],
            }
        )
    )  # fmt: skip
    kernel = SDPBackend.MATH if assumed["attention"] == "materialised" else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(kernel):
        trace = trace_trial(trial, free_bytes=1 << 40, steps=STEPS)
    ranks = RANKS["2080 Ti" if tower in SMALL else "TPU v3"]
    peaks = {}
    for optimizer, sharded in itertools.product(WEIGHED["optimizer"], WEIGHED["sharded"]):
        peaks[f"{optimizer}, {sharded}"] = weigh(trace, optimizer, sharded, ranks)
    return peaks


def weigh(trace: Trace, optimizer: str, sharded: str, ranks: int) -> int:
    """The peak had the optimizer kept so many tensors per weight, and ranks shared what is `sharded`.

    Gathered weights come back as two layers' worth: the largest tensor of weights, twice three times over.
    """
    share = {"optimizer state": 1.0, "gradients": 1.0, "trained weights": 1.0, "tower": 1.0}
    if optimizer == "adam":
        share["optimizer state"] = 2.0
    if sharded != "nothing":
        share["optimizer state"] /= ranks
    gathered = 0
    if sharded == "everything":
        for cause in ("gradients", "trained weights", "tower"):
            share[cause] /= ranks
        weights = [e.allocation.nbytes for e in trace.events if e.allocation.cause in ("trained weights", "tower")]
        gathered = 6 * max(weights, default=0)
    live = peak = 0.0
    for event in trace.events:
        live += event.change * share.get(event.allocation.cause, 1.0)
        if event.step:
            peak = max(peak, live)
    return int(peak) + gathered


def kept_bytes(kept: str, precision: str, optimizer: str, sharded: str, tower_parameters: int, ranks: int) -> int:
    """What a program that does not know of frozen weights still holds for them."""
    size = tower_parameters * (2 if precision == "bf16 throughout" else 4)
    gradients = size / (ranks if sharded == "everything" else 1) if kept in ("gradients", "both") else 0
    states = size * (2 if optimizer == "adam" else 1) if kept in ("optimizer state", "both") else 0
    return int(gradients + states / (1 if sharded == "nothing" else ranks))


def explain(peaks: dict[str, dict[str, int]], assumed: dict[str, Any], room: dict[str, int]) -> list[str]:
    """The thresholds that this point of the grid reproduces."""
    explained = []
    traced = [assumed[name] for name in TRACED]
    for name, (tower, stage, hardware, most, next_most) in THRESHOLDS.items():
        own = assumed["small"] if tower == "small" else tower
        extra = 0
        if stage == 2:
            extra = kept_bytes(
                assumed["kept_for_frozen"], assumed["precision"], assumed["optimizer"], assumed["sharded"],
                count_parameters(own, assumed["tubelet"]), RANKS[hardware],
            )  # fmt: skip
        key = f"{assumed['optimizer']}, {assumed['sharded']}"

        def fits(frames: int, own: str = own, stage: int = stage, extra: int = extra, key: str = key) -> bool:
            hardware = "2080 Ti" if own in SMALL else "TPU v3"
            return peaks[json.dumps([*traced, own, stage, frames])][key] + extra <= room[hardware]

        if fits(most) and not (next_most is not None and fits(next_most)):
            explained.append(name)
    return explained


@cache
def count_parameters(tower: str, tubelet: int) -> int:
    """Of a tower over tubelets."""
    return sum(parameter.numel() for parameter in build_hf_model(resolve_tower(tower), tubelet).parameters())


def main(arguments: Arguments) -> None:
    """Trace, keeping what there is; then count."""
    room = {name: capacity(find_accelerator(name), forecast_overhead(find_accelerator(name)))[1] for name in RANKS}
    arguments.results.mkdir(parents=True, exist_ok=True)
    kept = arguments.results / "paper_inference.partial.jsonl"
    peaks: dict[str, dict[str, int]] = {}
    if kept.exists():
        peaks = dict(json.loads(line) for line in kept.read_text().splitlines())
    for key, assumed, tower, stage, frames in track(list(list_traces()), "traces"):
        if key not in peaks:
            peaks[key] = trace_peaks(assumed, tower, stage, frames)
            with kept.open("a") as file:
                file.write(json.dumps([key, peaks[key]]) + "\n")
    names = [*TRACED, *WEIGHED]
    points = []
    for values in itertools.product(*TRACED.values(), *WEIGHED.values()):
        assumed = dict(zip(names, values, strict=True))
        points.append((assumed, explain(peaks, assumed, room)))
    best = max(len(explained) for _, explained in points)
    rows: list[dict[str, Any]] = []
    for count in range(len(THRESHOLDS), -1, -1):
        found = [explained for _, explained in points if len(explained) == count]
        rows.append(
            {"evidence": "forecast", "about": "thresholds explained", "value": count, "points": len(found),
             "share_of_grid": len(found) / len(points)}
        )  # fmt: skip
    for name in THRESHOLDS:
        found = [explained for _, explained in points if name in explained]
        rows.append(
            {"evidence": "forecast", "about": "threshold", "value": name, "points": len(found),
             "share_of_grid": len(found) / len(points),
             "share_of_best": share([name in explained for _, explained in points if len(explained) == best])}
        )  # fmt: skip
    for name, options in {**TRACED, **WEIGHED}.items():
        for option in options:
            rows.append(
                {"evidence": "forecast", "about": name, "value": str(option), "share_of_grid": 1 / len(options),
                 "share_of_best": share([p[name] == option for p, explained in points if len(explained) == best])}
            )  # fmt: skip
    settings = {
        "grid": {**TRACED, **WEIGHED}, "points": len(points), "best": best, "room_bytes": room, "traced_steps": STEPS,
        "peaks": peaks,
    }  # fmt: skip
    stem = write_report(arguments.results, "paper_inference", device=torch.device("cpu"), settings=settings, rows=rows)
    kept.unlink(missing_ok=True)
    print(f"{best} of {len(THRESHOLDS)} thresholds at best, of {len(points)} points; room " + ", ".join(
        f"{format_bytes(size)} of {name}" for name, size in room.items()) + f"; wrote {stem}.json and .md")  # fmt: skip


def share(answers: list[bool]) -> float:
    """Of those that are true."""
    return sum(answers) / len(answers)


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
