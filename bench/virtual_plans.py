"""Traces on fake tensors against PyTorch's own allocator on virtual GPUs: `python -m bench.virtual_plans`.

Steps of whole towers in both stages, of one rank and of the fullest of several. What a virtual GPU gives is PyTorch's
answer, a trace with the allocator model our forecast of it: the differences are the forecast's errors, as far as a
virtual GPU is like a real one.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from bigvivit.config import OptimConfig
from bigvivit.forecast.card import judge, resolve_types
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import capacity, forecast_overhead
from bigvivit.memory.ds_json import read_ds_json
from bigvivit.memory.plan import MemoryPlan
from bigvivit.training.report import run_bench, write_report
from bigvivit.trial import Trial, trace_trial
from bigvivit.trial_virtual import run_on_virtual_gpu

STEPS: tuple[dict[str, Any], ...] = (
    {"stage": 1, "frames": 8},
    {"stage": 2, "frames": 32},
    {"stage": 2, "frames": 128},
)
ENGINES = ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
"""Over the ranks, the shipped DeepSpeed files among them; for the first two of the steps."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Run and trace every step on every card, and write a report."""

    towers: tuple[str, ...] = ("vit-b", "vit-l", "vit-g")
    """Image towers."""
    hardware: tuple[str, ...] = ("2080 Ti", "A100 80GB", "H100")
    """Cards of the table."""
    ranks: int = 8
    """Ranks of the steps that are sharded."""
    ranks_on: str = "A100 80GB"
    """The card that these have."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Rows as they come, report."""
    kept = arguments.results / "virtual_plans.partial.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    cells = list(itertools.product(arguments.hardware, arguments.towers, STEPS, [("none", 1)]))
    sharded = [(engine, arguments.ranks) for engine in ENGINES]
    cells += itertools.product([arguments.ranks_on], arguments.towers, STEPS[:2], sharded)
    for cell in track(cells[len(rows) :], description="steps"):
        rows.append(compare_apart(*cell))
        with kept.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    settings = {"towers": arguments.towers, "hardware": arguments.hardware, "ranks": arguments.ranks}
    stem = write_report(arguments.results, "virtual_plans", device=torch.device("cpu"), settings=settings, rows=rows)
    kept.unlink()
    print(f"wrote {stem}.json and .md")


def compare_apart(hardware: str, tower: str, step: dict[str, Any], ranks: tuple[str, int]) -> dict[str, Any]:
    """One row, from a process of its own: DeepSpeed's engine runs on fake tensors once in one."""
    with get_context("spawn").Pool(1) as pool:
        row: dict[str, Any] = pool.apply(compare, (hardware, tower, step, *ranks))
    return row


def compare(hardware: str, tower: str, step: dict[str, Any], engine: str, world: int) -> dict[str, Any]:
    """One row."""
    card = find_accelerator(hardware)
    ds = None
    if engine.startswith("zero"):
        optim = OptimConfig(name="sgd", batch_size=world, epochs=1, warmup_epochs=0)
        ds = read_ds_json(Path(engine), optim, world)
    plan = resolve_types(MemoryPlan(), card)
    trial = Trial(tower=tower, plan=plan, world=world, fsdp=engine == "fsdp2", ds=ds, **step)
    start = time.perf_counter()
    own = run_on_virtual_gpu(trial, card)
    middle = time.perf_counter()
    _, there, _ = capacity(card, forecast_overhead(card, ranks=world))
    trace = trace_trial(trial, free_bytes=there, host=True, card=card)
    forecast = judge(trace, card, ranks=world)
    end = time.perf_counter()
    row: dict[str, Any] = {"hardware": card.name, "tower": tower, **step, "engine": engine}
    row |= {"ranks": world, "evidence": "virtual"}
    row |= {"fits": own.fits[1], "fits_by_trace": forecast.fits[1]}
    if own.expected.out_of_memory is None and forecast.fits[1]:
        allocated, reserved = own.expected.allocated_bytes, own.expected.reserved_bytes
        row |= {"allocated_bytes": allocated, "reserved_bytes": reserved}
        row["trace_allocated_error"] = trace.peak_bytes() / allocated - 1
        row["trace_reserved_error"] = forecast.runs[1].peak_reserved_bytes / reserved - 1
    else:
        row |= dict.fromkeys(("allocated_bytes", "reserved_bytes", "trace_allocated_error", "trace_reserved_error"))
    return {**row, "virtual_seconds": middle - start, "trace_seconds": end - middle}


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
