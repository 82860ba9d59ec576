"""The most frames that fit: `python bench/frame_capacity.py --limit 2GiB` on the CPU, `--hardware "2080 Ti"` anywhere.

Measured: each probe is a fresh process that runs three real steps, on the local CUDA device, or on the CPU under
RLIMIT_DATA. Virtual: each runs them on a card that is not there, until PyTorch's own CUDA allocator is out of memory.
Forecast: the same step traced on fake tensors; it says where the others look first, and stands alone for hardware that
cannot be virtual.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bigvivit.assemble import open_tower
from bigvivit.calibrate.calibration import AUTO, choose
from bigvivit.config import ConfigError, ModelConfig
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.capacity import Capacity, find_capacity
from bigvivit.forecast.card import judge, resolve_types
from bigvivit.forecast.hardware import find_local_gpus
from bigvivit.forecast.overhead import capacity, forecast_overhead
from bigvivit.forecast.trace import STEPS
from bigvivit.forecast.virtual_gpu import is_active
from bigvivit.plan import find_hardware
from bigvivit.processes import RankFailed, run_ranks
from bigvivit.training.report import run_bench, write_report
from bigvivit.trial import Trial, trace_trial
from bigvivit.trial_virtual import VirtualStep, run_fullest_rank, why_not_virtual
from bigvivit.units import GiB, KiB, format_bytes, parse_bytes

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "MemoryError", "Cannot allocate memory", "bad_alloc")
"""How PyTorch's CPU and CUDA allocators, Python, the C library and C++ say it."""
PROBE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 * KiB),
    "MALLOC_TRIM_THRESHOLD_": str(64 * KiB),
}
"""Environment of a probe: glibc gives each tensor pages of its own and gives them back, so that a limit counts what is
live. Left alone it keeps what was freed, in holes that nothing fits in, a heap for each thread."""
PLANS: dict[str, dict[str, Any]] = {
    "paper": {"chunk": "all"},
    "chunk-major": {"group": "chunk"},
    "layer-major": {},
    "cpu": {"placement": "cpu"},
    "disk": {"placement": "disk"},
    "nf4": {"storage": "nf4"},
}
"""Of stage 2, where they differ from layer-major in chunks of `--chunk`. Stage 1 has none of them."""
FEW, MANY = 8, 32
"""Frames at which each cell is traced first; at the fewer, what libraries take beside tensors is measured."""
TRAINED: dict[str, dict[str, Any]] = {"everything trains": {}, "recompute": {"recompute": 1}}
"""Of stage 1."""
KEPT = ("tower", "trained weights")
KINDS = ("measured", "virtual", "forecast")
"""Of evidence."""
PAPER = {
    ("TPU v3", "vit-h", 1): "96",
    ("TPU v3", "vit-h", 2): "128, the most it tried",
    ("TPU v3", "vit-g", 1): "8",
    ("TPU v3", "vit-g", 2): "48",
}
"""Frames that the paper says fit 16 GB at a local batch of 1 (§4.8, Table 4). Its plan of stage 2 is ours of that name;
nothing is said of element types, recompute, optimizer sharding or the depth of the temporal transformer."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Find frame capacities."""

    towers: tuple[str, ...] = ("vit-b",)
    """Image towers."""
    stages: tuple[Literal[1, 2], ...] = (1, 2)
    """1: everything trains. 2: adapter, temporal transformer and head do."""
    plans: tuple[str, ...] = tuple(PLANS)
    """Memory plans of stage 2."""
    limit: str | None = None
    """Measure on the CPU under this much RLIMIT_DATA, such as 2GiB; forecasts stand beside."""
    hardware: str | None = None
    """Probe a virtual card: an accelerator of the table; where there can be none, and for memory such as 24GiB, only
    forecast. Without either: measure the local GPU."""
    calibration: str = AUTO
    """What `bigvivit calibrate` measured on the card, as in `bigvivit plan`: `auto`, a file, or `none`."""
    ranks: int = 1
    """Devices that train together, the optimizer's state on each (DDP)."""
    fsdp: bool = False
    """Shard over the ranks with FSDP2."""
    compute: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Element type the frozen tower computes in; under a limit on the CPU, fp32."""
    chunk: int = 8
    """Tubelets that go through a layer at once, but in the paper's way."""
    layers: int | None = None
    """Use so many of the tower's layers only."""
    temporal_depth: int = 4
    """Layers of the temporal transformer."""
    most: int = 512
    """Frames at which the search ends."""
    results: Path = ROOT / "bench" / "results"
    """Folder of reports."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.plans if name not in PLANS]:
            raise ConfigError(f"plans: {', '.join(unknown)} is none of {', '.join(PLANS)}")
        if self.limit is not None:
            try:
                parse_bytes(self.limit)
            except ValueError as error:
                raise ConfigError(f"limit: {error}; give 2GiB, for instance") from None
        if self.limit is not None and self.hardware is not None:
            raise ConfigError("limit and hardware: one measures here, the other forecasts for elsewhere; leave one out")


def list_cells(arguments: Arguments) -> list[tuple[str, Trial]]:
    """(plan, trial) with as few frames as there can be."""
    cells = []
    compute = arguments.compute if arguments.limit is None else "fp32"
    for tower in arguments.towers:
        for name, changes in TRAINED.items() if 1 in arguments.stages else ():
            cells.append((name, describe_trial(arguments, tower, 1, changes)))
        for name in arguments.plans if 2 in arguments.stages else ():
            changes = {"compute": compute, "group": "all", "chunk": arguments.chunk, **PLANS[name]}
            if changes["group"] == "chunk":
                changes["group"] = arguments.chunk
            if compute == "fp16" and "storage" not in changes:
                changes["storage"] = "fp16"
            if arguments.fsdp and ("placement" in changes or changes.get("storage") == "nf4"):
                continue  # every rank keeps such a tower whole
            cells.append((name, describe_trial(arguments, tower, 2, changes)))
    return cells


def describe_trial(arguments: Arguments, tower: str, stage: int, plan: dict[str, Any]) -> Trial:
    """One cell, with two frames."""
    values = {
        "stage": stage, "tower": tower, "frames": 2, "plan": plan, "layers": arguments.layers,
        "temporal_depth": arguments.temporal_depth, "world": arguments.ranks, "fsdp": arguments.fsdp,
    }  # fmt: skip
    return Trial.from_json(json.dumps(values))


def probe(trial: Trial, limit: int | None, device: str) -> dict[str, Any] | None:
    """What three real steps in fresh processes came to, the greatest of all ranks; None where one was short of memory.

    Any other failure is an error.
    """

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    words = ["-m", "bigvivit.trial_run", trial.to_json(), "3", device]
    try:
        found = run_ranks(words, trial.world, environment=PROBE, before=restrict)
    except RankFailed as error:
        if any(words in error.errors for words in OUT_OF_MEMORY):
            return None
        raise
    return {key: max(rank[key] for rank in found) for key in found[0]}


def beside_tensors(trial: Trial, found: dict[str, Any]) -> tuple[int, int]:
    """Bytes that count towards the limit beside PyTorch's tensors: after imports, and what libraries took since."""
    tensors = trace_trial(trial, free_bytes=GiB).left_bytes()
    before = int(found["data_bytes_before"])
    return before, int(found["data_bytes"]) - before - tensors


@dataclass
class Forecast:
    """Peaks of one cell for any number of frames, each traced once."""

    trial: Trial
    card: Accelerator | None
    """None for the CPU."""
    room_bytes: int
    """What tensors may take; of a card, in the expected case."""
    peaks: dict[int, int] = field(default_factory=dict)
    flops: dict[int, int] = field(default_factory=dict)
    """Of the traces."""
    kept: dict[str, int] = field(default_factory=dict)
    """Bytes of weights, on the device and the host, whatever the frames."""
    steps: int = STEPS
    """Traced."""
    binds: str = ""
    """The largest cause at the last peak that was too high."""
    largest: str = ""
    """Of the last peak, whether it was or not."""

    def calibrate(self, limit: int) -> None:
        """Take off the limit what the same steps on few frames have beside tensors, in a process without a limit."""
        few = replace(self.trial, frames=FEW)
        found = probe(few, None, "cpu")
        assert found is not None
        self.room_bytes = limit - sum(beside_tensors(few, found))

    def fits(self, frames: int) -> bool:
        """Whether a trace stays within the room; for an accelerator, whether the allocator model says so."""
        card = self.card
        trial = replace(self.trial, frames=frames)
        if card is not None:
            trial = replace(trial, plan=resolve_types(trial.plan, card))
        apart = card is not None
        trace = trace_trial(trial, free_bytes=self.room_bytes, host=apart, card=card, steps=self.steps)
        self.flops[frames] = trace.flops
        self.kept = {cause: trace.left_bytes("cpu", cause) + trace.left_bytes("host", cause) for cause in KEPT}
        self.peaks[frames] = trace.peak_bytes()
        within = self.peaks[frames] <= self.room_bytes
        fits = within if card is None else judge(trace, card, ranks=trial.world).fits[1]
        self.largest = next(iter(trace.composition()))
        if not fits:
            self.binds = self.largest
        return fits

    def peak(self, frames: int) -> int:
        """Of a trace, the one there was or a new one."""
        if frames and frames not in self.peaks:
            self.fits(frames)
        return self.peaks.get(frames, 0)

    def search(self, most: int) -> Capacity:
        """Peaks are piecewise linear in frames: two of them say where to look."""
        for frames in (FEW, MANY):
            self.fits(frames)
        slope = max((self.peaks[MANY] - self.peaks[FEW]) / (MANY - FEW), 1)
        guess = MANY + int((self.room_bytes - self.peaks[MANY]) / slope)
        return find_capacity(self.fits, unit=self.trial.tubelet, most=most, guess=max(2, min(guess, most)))


def main(arguments: Arguments) -> None:
    """Search each cell; rows are kept as they come, and a run that was interrupted goes on."""
    for tower in arguments.towers:  # what is misspelt is said before anything is measured
        open_tower(ModelConfig(tower=tower, tower_init="random", tubelet=2), seed=0)
    limit = parse_bytes(arguments.limit) if arguments.limit is not None else None
    card = find_card(arguments)
    evidence = choose_evidence(arguments, card)
    device = "cpu" if card is None else "cuda"
    where = f"{arguments.limit} of the CPU" if card is None else card.name
    if arguments.ranks > 1:
        where = f"{arguments.ranks} x {where}"
    room = limit or 0 if card is None else capacity(card, forecast_overhead(card, ranks=arguments.ranks))[1]
    arguments.results.mkdir(parents=True, exist_ok=True)
    bench = "frame_capacity_" + "_".join(where.lower().split())
    kept = arguments.results / f"{bench}.partial.jsonl"
    done = read_kept(kept)
    rows = []
    for name, trial in track(list_cells(arguments), "cells"):
        key = f"{where} {name} {trial.to_json()} {arguments.most}"
        if key in done:
            rows.append(done[key])
            continue
        forecast = Forecast(trial, card, room)
        if limit is not None:
            forecast.calibrate(limit)
        expected = forecast.search(arguments.most)
        row: dict[str, Any] = {
            "key": key, "where": where, "tower": trial.tower, "stage": trial.stage, "plan": name,
            "evidence": evidence,
        }  # fmt: skip
        if arguments.hardware is None:
            row |= measure(trial, limit, device, arguments.most, guess=expected.frames, forecast=forecast)
            row[f"{evidence}_frames"] = row.pop("found_frames")
        elif evidence == "virtual":
            assert card is not None
            row |= probe_virtual(trial, card, arguments.most, guess=expected.frames)
        row |= {"forecast_frames": expected.frames, "more_may_fit": expected.beyond, "binds": forecast.binds}
        row |= {"room_bytes": forecast.room_bytes, "peak_bytes": forecast.peak(expected.frames)}
        row["paper_frames"] = PAPER.get((where, trial.tower, trial.stage), "")
        row["peaks"] = forecast.peaks
        rows.append(row)
        keep(kept, row)
        print(f"{trial.tower}, stage {trial.stage}, {name}: " + ", ".join(
            f"{kind} {row[f'{kind}_frames']}" for kind in KINDS if f"{kind}_frames" in row
        ), flush=True)  # fmt: skip
    curves = {f"{row['tower']}, {row['stage']}, {row['plan']}": row.pop("peaks") for row in rows}
    for row in rows:
        row.pop("key")
    names = ("layers", "temporal_depth", "ranks", "fsdp", "compute", "chunk")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if card is not None:
        settings["overheads"] = "of the tables" if card.measured is None else card.measured.where
    settings |= {"local_batch": 1, "size": 224, "tubelet": 2, "optimizer": "sgd with momentum", "probe": PROBE}
    here = torch.device(device if arguments.hardware is None else "cpu")
    stem = write_report(arguments.results, bench, device=here, settings=settings, rows=rows)
    draw(stem.with_name(f"{stem.name}.png"), {where: (max(row["room_bytes"] for row in rows), curves)})
    kept.unlink(missing_ok=True)
    table = Table("tower", "stage", "plan", *KINDS, "paper", title=where)
    for row in rows:
        table.add_row(
            row["tower"], str(row["stage"]), row["plan"],
            str(row.get("measured_frames", "-")), str(row.get("virtual_frames", "-")),
            f"{row['forecast_frames']}{'+' if row['more_may_fit'] else ''}", row["paper_frames"] or "-",
        )  # fmt: skip
    Console().print(table)
    print(f"wrote {stem}.json, .md and .png")


def read_kept(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run that did not come to its end, by key."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["key"]: row for row in lines}


def keep(path: Path, row: dict[str, Any]) -> None:
    """A row is there for the next run."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def find_card(arguments: Arguments) -> Accelerator | None:
    """What to measure on or to forecast for; None for the CPU. Raises ConfigError."""
    if arguments.hardware is not None:
        return choose(find_hardware(arguments.hardware), arguments.calibration)
    if arguments.limit is not None:
        return None
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here: give --limit 2GiB to measure on the CPU, or --hardware NAME")
    probed = str(torch.cuda.get_device_properties(0).uuid)
    here = next(gpu.accelerator for gpu in find_local_gpus() if probed in gpu.uuid)
    return choose(here, arguments.calibration)


def choose_evidence(arguments: Arguments, card: Accelerator | None) -> str:
    """What the capacities will be; says why where it is a forecast alone."""
    if arguments.hardware is None:
        return "virtual" if is_active() else "measured"  # in a process on virtual GPUs nothing is measured
    assert card is not None
    reason = why_not_virtual(card)
    if reason is None:
        return "virtual"
    print(f"forecasts alone, no virtual GPU: {reason}", flush=True)
    return "forecast"


def probe_virtual(trial: Trial, card: Accelerator, most: int, *, guess: int) -> dict[str, Any]:
    """The capacity by steps on a virtual card, whose context and communicators are as large as expected."""
    steps: dict[int, VirtualStep] = {}

    def fits(frames: int) -> bool:
        start = time.perf_counter()
        tried = replace(trial, frames=frames, plan=resolve_types(trial.plan, card))
        found = steps[frames] = run_fullest_rank(tried, card, card.memory_bytes)
        answer = "fit" if found.out_of_memory is None else "out of memory"
        print(f"  {frames} frames: {answer}, {time.perf_counter() - start:.0f} s", flush=True)
        return found.out_of_memory is None

    found = find_capacity(fits, unit=trial.tubelet, most=most, guess=max(trial.tubelet, guess))
    row: dict[str, Any] = {"virtual_frames": found.frames, "probes": len(found.probes)}
    if found.frames:
        last = steps[found.frames]
        row |= {"virtual_allocated_bytes": last.allocated_bytes, "virtual_reserved_bytes": last.reserved_bytes}
    return row


def measure(
    trial: Trial, limit: int | None, device: str, most: int, *, guess: int, forecast: Forecast
) -> dict[str, Any]:
    """The capacity by real probes, and what the limit counts at it."""
    last: dict[int, dict[str, Any]] = {}

    def fits(frames: int) -> bool:
        start = time.perf_counter()
        found = probe(replace(trial, frames=frames), limit, device)
        answer = "out of memory" if found is None else "fit"
        print(f"  {frames} frames: {answer}, {time.perf_counter() - start:.0f} s", flush=True)
        if found is not None:
            last[frames] = found
        return found is not None

    found = find_capacity(fits, unit=trial.tubelet, most=most, guess=max(trial.tubelet, guess))
    row: dict[str, Any] = {"found_frames": found.frames, "probes": len(found.probes)}
    if limit is not None and found.frames:
        imports, libraries = beside_tensors(replace(trial, frames=found.frames), last[found.frames])
        peak = forecast.peak(found.frames)
        row |= {"limit_bytes": limit, "imports_bytes": imports, "libraries_bytes": libraries}
        row["left_bytes"] = limit - imports - libraries - peak  # by the forecast, at the measured capacity
        row["tubelet_bytes"] = forecast.peak(found.frames + trial.tubelet) - peak
    return row


def draw(path: Path, panels: dict[str, tuple[int, dict[str, dict[Any, int]]]]) -> None:
    """Forecast peaks against frames, and the room there is: (bytes, curves) for each place."""
    figure, axes = plt.subplots(1, len(panels), figsize=(8 * len(panels), 5), squeeze=False)
    for (where, (room, curves)), axis in zip(panels.items(), axes[0], strict=True):
        for name, peaks in curves.items():
            points = sorted((int(frames), peak / GiB) for frames, peak in peaks.items())
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.axhline(room / GiB, color="black", linestyle="--", label=f"{format_bytes(room)} of room in {where}")
        axis.set(xlabel="frames", ylabel="peak, GiB (forecast)")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    try:
        run_bench(main, Arguments, __doc__)
    except RankFailed as error:
        sys.exit(f"error: a probe ended, and not for want of memory; the rows so far are kept: {error}")
