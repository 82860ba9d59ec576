"""The rows, in the order in which they are worth having: wherever a run is cut, what matters most is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bigvivit.calibrate import cells, facts, rates, times
from bigvivit.calibrate.journal import Side
from bigvivit.memory.plan import CHUNK, MemoryPlan
from bigvivit.model.catalog import SIZES
from bigvivit.trial import Trial
from bigvivit.units import GiB, MiB

Group = Literal["facts", "memory", "capacity", "rates", "times"]
Job = Callable[[], dict[str, Any]]
FRAMES, FEW_FRAMES, STEP_FRAMES = 64, 8, 16
"""Of stage 2, of stage 1, and of steps that are compared in seconds."""
STREAMED: dict[str, dict[str, Any]] = {
    "layer-major": {"group": "all", "chunk": CHUNK},
    "paper": {"group": "all", "chunk": "all"},
    "chunk-major": {"group": CHUNK, "chunk": CHUNK},
    "cpu": {"group": "all", "chunk": CHUNK, "placement": "cpu"},
    "disk": {"group": "all", "chunk": CHUNK, "placement": "disk"},
}
"""Plans of stage 2; `paper` is all frames at once."""
TRAINED: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimizer": "adamw"},
    "recompute": {"plan": {"recompute": 1}},
    "offload": {"plan": {"offload_activations": True}},
    "bf16 masters": {"plan": {"masters": "bf16"}},
}
"""Of stage 1."""
CODES: dict[str, dict[str, Any]] = {"int8": {"storage": "int8"}, "nf4": {"storage": "nf4"}}
"""bitsandbytes' forms, of the first tower only: packing takes long."""
EMULATED = (11, 16, 24)
"""GiB that PyTorch's allocator may have."""
MOST_FRAMES = 1024
SECONDS = {"vit-demo": 1.5, "vit-l": 4.0, "vit-h": 6.0, "vit-g": 8.0}
"""That a row of such a tower is thought to take; others take 3."""
CPU_TOWERS, CUDA_TOWERS = ("vit-demo",), ("vit-b", "vit-g")


@dataclass(frozen=True)
class Row:
    """One thing that is measured, and what else answers it."""

    group: Group
    name: str
    seconds: float
    """That it is thought to take on the device."""
    jobs: dict[Side, Job]
    """By who answers. Each is sent to a child process."""
    fresh: bool = False
    """In a process that has done nothing yet."""
    alone: bool = False
    """It is about seconds: where there are few cores nothing else computes meanwhile."""

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"


def list_rows(identity: dict[str, Any], towers: tuple[str, ...], out: Path) -> list[Row]:
    """All rows of the device that `device.identify` found; recordings go below `out`."""
    if identity["device"] == "cpu":
        return list(list_cpu(towers or CPU_TOWERS))
    rows = list(list_cuda(identity, towers or CUDA_TOWERS, out))
    if identity["evidence"] == "measured":
        return rows
    # What the device says is then what a virtual card says.
    return [replace(row, jobs={side: job for side, job in row.jobs.items() if side != "virtual"}) for row in rows]


def list_cuda(identity: dict[str, Any], towers: tuple[str, ...], out: Path) -> Iterator[Row]:
    """Facts, memory, rates, seconds, capacities."""
    card = {name: identity[name] for name in ("card", "capability", "memory_bytes")}
    both: tuple[Side, ...] = ("device", "virtual")
    yield Row("facts", "context", 5.0, {"device": facts.measure_context}, fresh=True)
    yield Row("facts", "workspaces", 3.0, dict.fromkeys(both, facts.measure_workspaces))
    yield Row("facts", "attention", 3.0, dict.fromkeys(both, facts.choose_kernels))
    bf16 = (identity["capability"] or 0) >= 80
    for tower, name, trial in list_trials(towers, "bf16" if bf16 else "fp32"):
        text, seconds = trial.to_json(), SECONDS.get(tower, 3.0)
        recording = out / "recordings" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.pickle"
        jobs: dict[Side, Job] = {
            "device": partial(cells.run_on_gpu, text, str(recording)),
            "forecast": partial(cells.forecast_on_gpu, text, **card),
            "virtual": partial(cells.run_on_gpu, text, None),
        }
        yield Row("memory", name, seconds if trial.plan.storage == "bf16" else 10 * seconds, jobs)
    yield Row("rates", "link", 2.0, {"device": partial(rates.measure_link, 256 * MiB)}, alone=True)
    yield Row("rates", "products", 4.0, {"device": partial(rates.measure_products, "cuda", 8192)}, alone=True)
    yield Row("rates", "disk", 4.0, {"device": partial(rates.measure_disk, "cuda", 256 * MiB)}, alone=True)
    yield from list_times("cuda", towers, "bf16" if bf16 else "fp32")
    # The forecasts are ahead of the device by now, and each search begins where they ended.
    for name, trial, limit in list_capacities(towers, "bf16" if bf16 else "fp32"):
        search: dict[str, Any] = {"trial": trial.to_json(), "limit_bytes": limit, "most": MOST_FRAMES}
        on_card = partial(cells.find_frames, **search, guess=None)
        jobs = {"device": on_card, "forecast": partial(cells.forecast_frames, **search, **card), "virtual": on_card}
        yield Row("capacity", name, 4 * SECONDS.get(trial.tower, 3.0), jobs)


def list_cpu(towers: tuple[str, ...]) -> Iterator[Row]:
    """What forecasts for a CPU depend on."""
    few = build(towers[0], 2, FEW_FRAMES, STREAMED["layer-major"], "fp32").to_json()
    yield Row("facts", "process", 8.0, {"device": partial(facts.measure_process, few)}, fresh=True)
    yield Row("rates", "memory", 1.0, {"device": partial(rates.measure_memory, 256 * MiB)}, alone=True)
    yield Row("rates", "products", 3.0, {"device": partial(rates.measure_products, "cpu", 1024)}, alone=True)
    yield Row("rates", "disk", 3.0, {"device": partial(rates.measure_disk, "cpu", 64 * MiB)}, alone=True)
    for _, name, trial in list_trials(towers, "fp32"):
        if trial.plan.storage != "bf16" or name.endswith(("offload", "bf16 masters")):
            continue  # a minute is short
        text = trial.to_json()
        jobs: dict[Side, Job] = {
            "device": partial(cells.run_on_cpu, text),
            "forecast": partial(cells.forecast_on_cpu, text),
        }
        yield Row("memory", name, SECONDS.get(trial.tower, 3.0), jobs)
    yield from list_times("cpu", towers, "fp32")


def list_trials(towers: tuple[str, ...], compute: str) -> Iterator[tuple[str, str, Trial]]:
    """(tower, name, trial): every plan of each tower in turn, and at last those that take long."""
    for kind, plan in STREAMED.items():
        for tower in towers:
            yield tower, name_of(tower, 2, FRAMES, kind), build(tower, 2, FRAMES, plan, compute)
        if kind == "layer-major":
            for own, changes in TRAINED.items():
                for tower in towers:
                    yield tower, name_of(tower, 1, FEW_FRAMES, own), build(tower, 1, FEW_FRAMES, {}, compute, changes)
    for kind, form in CODES.items():
        plan = {**STREAMED["layer-major"], **form}
        yield towers[0], name_of(towers[0], 2, FRAMES, kind), build(towers[0], 2, FRAMES, plan, compute)


def name_of(tower: str, stage: int, frames: int, kind: str) -> str:
    """Of a row about a step, for people and for the journal."""
    return f"{tower}, stage {stage}, {frames} frames, {kind}"


def build(
    tower: str,
    stage: Literal[1, 2],
    frames: int,
    plan: dict[str, Any],
    compute: str,
    more: dict[str, Any] | None = None,
) -> Trial:
    """Element types named, so that all who answer take the same."""
    changes = dict(more or {})
    autocast = "bf16" if compute == "bf16" else "fp32"
    settings: dict[str, Any] = {"compute": compute, "autocast": autocast, **plan, **changes.pop("plan", {})}
    if stage == 1:
        del settings["compute"]
    size = SIZES[tower].image_size if tower in SIZES else 224
    return Trial(stage=stage, tower=tower, frames=frames, size=size, plan=MemoryPlan(**settings), **changes)


def list_capacities(towers: tuple[str, ...], compute: str) -> Iterator[tuple[str, Trial, int]]:
    """(name, trial, bytes): the quick ones first."""
    small, giant = towers[0], towers[-1]
    found: list[tuple[str, Literal[1, 2], str, int]] = [(small, 1, "sgd", gib) for gib in EMULATED]
    found += [
        (giant, 1, "recompute", 24),
        (giant, 1, "sgd", 24),
        (giant, 2, "paper", 11),
        (giant, 1, "recompute", 16),
        (small, 1, "adamw", 11),
    ]
    seen = set()
    for tower, stage, kind, gib in found:
        name = f"{tower}, stage {stage}, {kind}, {gib} GiB"
        if name in seen:  # of one tower only
            continue
        seen.add(name)
        plan = STREAMED[kind] if stage == 2 else {}
        more = TRAINED[kind] if stage == 1 else {}
        yield name, build(tower, stage, 2, plan, compute, more), gib * GiB


def list_times(device: str, towers: tuple[str, ...], compute: str) -> Iterator[Row]:
    """Whole steps of both stages on the same frames; the tower alone, streamed and batched."""
    steps: list[tuple[Literal[1, 2], str, dict[str, Any]]]
    for tower in reversed(towers):
        seconds = SECONDS.get(tower, 3.0)
        steps = [(1, "sgd", {}), *((2, kind, STREAMED[kind]) for kind in ("paper", "layer-major", "chunk-major"))]
        for stage, kind, plan in steps:
            text = build(tower, stage, STEP_FRAMES, plan, compute).to_json()
            job = partial(times.time_step, device, text)
            yield Row(
                "times", f"step, {name_of(tower, stage, STEP_FRAMES, kind)}", seconds, {"device": job}, alone=True
            )
        for kind, plan in STREAMED.items():
            job = partial(times.time_tower, device, build(tower, 2, FRAMES, plan, compute).to_json())
            name = f"tower alone, {tower}, {FRAMES} frames, {kind}"
            yield Row("times", name, seconds, {"device": job}, alone=True)
