"""The paper's Table 4 and §4.8 beside our forecasts: `python -m bench.paper_table`. Nothing here is measured.

Which of 4 to 128 frames fit a TPU v3 of 16 GB, and eight 2080 Ti, at a local batch of 1; how far each way of streaming
the tower goes beyond; what binds; and what a step would take by a roofline. The TPU is forecast as if PyTorch's caching
allocator served it: XLA's fusion, layouts and padding are not modelled. Its 64 devices share nothing, and nothing is
counted for the reduction of gradients; eight cards run DistributedDataParallel, with its buckets, or FSDP2.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from bench.frame_capacity import FEW, MANY, PLANS, TRAINED, Forecast, draw, keep, read_kept
from bigvivit.config import ConfigError
from bigvivit.forecast.card import resolve_types
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import capacity, forecast_overhead
from bigvivit.forecast.speed import EFFICIENCY_OF_PRODUCTS, EFFICIENCY_OF_TRANSFERS, Work, forecast_seconds
from bigvivit.training.report import run_bench, write_report
from bigvivit.trial import Trial

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (4, 8, 16, 32, 48, 64, 96, 128)
"""Of Table 4."""
PAPER = {
    ("TPU v3", "vit-h", 1): 96,
    ("TPU v3", "vit-h", 2): 128,
    ("TPU v3", "vit-g", 1): 8,
    ("TPU v3", "vit-g", 2): 48,
}
"""The most of these that fitted (Table 4)."""
CARDS = {1: 16, 2: 80}
"""What fitted each of eight 12 GB cards, by stage (§4.8, which does not name the tower)."""
MOST, CHUNK, STEPS = 1024, 32, 2
"""Frames at which a search ends; tubelets that go through a layer at once; traced steps, momentum being there from the
second on."""
DINOV3 = "facebook/dinov3-vit7b16-pretrain-lvd1689m"


@dataclass(frozen=True)
class Cell:
    """One row."""

    hardware: str
    ranks: int
    tower: str
    stage: int
    plan: str
    types: dict[str, str]
    fsdp: bool = False

    def build(self) -> Trial:
        """As a trial on two frames."""
        if self.stage == 1:
            plan = TRAINED[self.plan]
        else:
            plan = {"group": "all", "chunk": CHUNK, **self.types, **PLANS[self.plan]}
            if plan["group"] == "chunk":
                plan["group"] = CHUNK
        values = {"stage": self.stage, "tower": self.tower, "frames": 2, "plan": plan}
        trial = Trial.from_json(json.dumps({**values, "world": self.ranks, "fsdp": self.fsdp}))
        return replace(trial, plan=resolve_types(trial.plan, find_accelerator(self.hardware)))


def list_cells() -> list[Cell]:
    """Table 4, eight cards, and what the paper did not try."""
    fp16 = {"storage": "fp16", "compute": "fp16"}
    cells = [
        Cell("TPU v3", 1, tower, stage, plan, {})
        for stage, plan in (*((1, plan) for plan in TRAINED), *((2, plan) for plan in PLANS))
        for tower in ("vit-h", "vit-g")
    ]
    cells += [
        Cell("2080 Ti", 8, tower, stage, plan, fp16)
        for tower in ("vit-b", "vit-l", "vit-h")
        for stage, plan in ((1, "everything trains"), (2, "paper"))
    ]
    cells += [Cell("2080 Ti", 1, "vit-g", 2, plan, fp16) for plan in PLANS if plan != "disk"]
    cells += [Cell("2080 Ti", 8, "vit-g", 2, "layer-major", fp16, fsdp) for fsdp in (False, True)]
    # DINOv3 is reported to overflow in fp16, and these cards have no bf16 units.
    cells.append(Cell("2080 Ti", 8, DINOV3, 2, "layer-major", {"storage": "bf16", "compute": "fp32"}, True))
    return cells


def forecast_cell(cell: Cell) -> dict[str, Any]:
    """Its capacity, what binds it and how long a step takes."""
    card, trial = find_accelerator(cell.hardware), cell.build()
    overhead = forecast_overhead(card, ranks=cell.ranks)
    forecast = Forecast(trial, card, capacity(card, overhead)[1], steps=STEPS)
    found = forecast.search(MOST)
    paper: int | None = PAPER.get((cell.hardware, cell.tower, cell.stage))
    if cell.hardware == "2080 Ti" and cell.ranks == 8 and cell.plan in ("everything trains", "paper"):
        paper = CARDS[cell.stage]
    binds = forecast.binds or f"nothing; largest: {forecast.largest}"
    row: dict[str, Any] = {
        "evidence": "forecast", "hardware": cell.hardware, "ranks": cell.ranks, "tower": cell.tower,
        "stage": cell.stage, "plan": f"{cell.plan}, FSDP2" if cell.fsdp else cell.plan,
        "most_frames": found.frames, "more_may_fit": found.beyond,
        "of_table_4": " ".join(str(frames) for frames in COLUMNS if frames <= found.frames) or "none",
        "paper_most_frames": paper, "binds": binds, "room_bytes": forecast.room_bytes,
    }  # fmt: skip
    if found.beyond:  # by the line through the last two traces: no trace has confirmed it
        line = (forecast.peaks[MOST] - forecast.peaks[MANY]) / (MOST - MANY)
        row["frames_by_line"] = MOST + int((forecast.room_bytes - forecast.peaks[MOST]) / line)
    if found.frames:
        frames = min(found.frames, COLUMNS[-1])
        row["timed_frames"] = frames
        try:
            best, expected, worst = forecast_seconds(describe_work(forecast, frames), card)["step"]
            row |= {"best_seconds": best, "expected_seconds": expected, "worst_seconds": worst}
        except ConfigError as error:  # a rate that the hardware table does not have
            row["not_timed"] = str(error)
    row["peaks_bytes"] = forecast.peaks
    return row


def describe_work(forecast: Forecast, frames: int) -> Work:
    """Of a step on so many frames. Operations lie on a line in frames, but for the temporal attention's few."""
    trial, flops = forecast.trial, forecast.flops
    line = (flops[MANY] - flops[FEW]) / (MANY - FEW)
    tubelets, plan = frames // trial.tubelet, trial.plan
    chunk, group = (tubelets if isinstance(size, str) else size for size in (plan.chunk, plan.group))
    whole = trial.world if trial.fsdp else 1
    frozen = trial.stage == 2
    rate = plan.compute if frozen else plan.autocast
    assert rate != "auto"
    return Work(
        flops=int(flops[FEW] + line * (frames - FEW)),
        rate=rate,
        tower_bytes=forecast.kept["tower"] * whole if frozen else 0,
        reads=-(-tubelets // chunk),
        fetches=-(-tubelets // group) if plan.placement != "device" or trial.fsdp else 0,
        sharded=trial.fsdp,
        trained_bytes=forecast.kept["trained weights"] * whole,
        ranks=trial.world,
    )


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Forecast every cell; an interrupted run goes on."""

    results: Path = ROOT / "bench" / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Search, keep, write, draw."""
    arguments.results.mkdir(parents=True, exist_ok=True)
    kept = arguments.results / "paper_table.partial.jsonl"
    done, rows = read_kept(kept), []
    for cell in track(list_cells(), "cells"):
        key = json.dumps(asdict(cell))
        if key not in done:
            done[key] = {"key": key, **forecast_cell(cell)}
            keep(kept, done[key])
            print(f"{key}: {done[key]['most_frames']}", flush=True)
        rows.append(done[key])
    panels: dict[str, tuple[int, dict[str, dict[Any, int]]]] = {}
    for row in rows:
        where = row["hardware"] if row["ranks"] == 1 else f"{row['ranks']} x {row['hardware']}"
        curves = panels.setdefault(where, (row["room_bytes"], {}))[1]
        curves[f"{row['tower'].split('/')[-1]}, stage {row['stage']}, {row['plan']}"] = row.pop("peaks_bytes")
        row.pop("key")
    settings = {
        "local_batch": 1, "size": 224, "tubelet": 2, "temporal_depth": 4, "optimizer": "sgd with momentum",
        "chunk": CHUNK, "most_frames": MOST, "traced_steps": STEPS, "best_expected_worst": {
            "of_rate": EFFICIENCY_OF_PRODUCTS, "of_bandwidths": EFFICIENCY_OF_TRANSFERS
        },
    }  # fmt: skip
    stem = write_report(arguments.results, "paper_table", device=torch.device("cpu"), settings=settings, rows=rows)
    draw(stem.with_name(f"{stem.name}.png"), panels)
    kept.unlink(missing_ok=True)
    print(f"wrote {stem}.json, .md and .png")


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
