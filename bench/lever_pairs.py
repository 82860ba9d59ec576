"""Every pair of memory levers under every engine, in both stages, on real train steps: `python -m bench.lever_pairs`.

A pair works (it trains; where both only change where and when, to the losses of training without them), is refused, or
works without being of use. What is to be refused or is of no use is written down here; a test walks the same cells.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track

from bigvivit.training.report import run_bench, write_report
from tests.memory.walk import ENGINES, Cell, walk


@dataclass(frozen=True)
class Lever:
    """One setting."""

    name: str
    of: str
    """The setting it is a value of: two values of one are no pair."""
    cell: Cell
    """What it adds to a cell of the walk."""
    exact: bool = True
    """Whether it changes where and when, not what."""


LEVERS = (
    Lever("recompute", "recompute", {"plan": {"recompute": 1}}),
    Lever("activations on host", "activations", {"plan": {"offload_activations": True}}),
    Lever("masters bf16", "masters", {"plan": {"masters": "bf16"}}, exact=False),
    Lever("8-bit optimizer", "optimizer", {"optimizer": "sgd8bit"}, exact=False),
    Lever("optimizer on host", "offload", {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    Lever("autocast bf16", "autocast", {"plan": {"autocast": "bf16"}}, exact=False),
    Lever("tower on host", "placement", {"plan": {"placement": "cpu"}}),
    Lever("tower on disk", "placement", {"plan": {"placement": "disk"}}),
    Lever("storage bf16", "storage", {"plan": {"storage": "bf16"}}, exact=False),
    Lever("storage int8", "storage", {"plan": {"storage": "int8"}}, exact=False),
    Lever("storage nf4", "storage", {"plan": {"storage": "nf4"}}, exact=False),
    Lever("layer by layer", "stream", {"plan": {"group": "all", "chunk": 1}}),
    Lever("chunk by chunk", "stream", {"plan": {"group": 2, "chunk": 2}}),
)
OF_A_TOWER = {"placement", "stream", "storage"}
PACKED = {"tower on host", "tower on disk", "storage int8", "storage nf4"}
PER_PROCESS = 60
"""Cells that share a process: DeepSpeed's engines leave about 20 MB each."""
Verdict = Literal["works", "refused", "pointless"]


@dataclass(frozen=True)
class Entry:
    """One cell of the table: at most two levers under one engine in one stage."""

    engine: str
    stage: int
    levers: tuple[Lever, ...]

    @property
    def names(self) -> str:
        return " + ".join(lever.name for lever in self.levers) or "none"

    @property
    def exact(self) -> bool:
        return all(lever.exact for lever in self.levers)

    def cell(self) -> Cell:
        """For the walk."""
        plan: dict[str, Any] = {}
        cell: Cell = {"stage": self.stage, "plan": plan}
        for lever in self.levers:
            plan.update(lever.cell.get("plan", {}))
            cell |= {key: value for key, value in lever.cell.items() if key != "plan"}
        return cell


def list_entries(engine: str) -> list[Entry]:
    """None, each lever and each pair, in both stages."""
    chosen = [
        levers
        for count in range(3)
        for levers in itertools.combinations(LEVERS, count)
        if len({lever.of for lever in levers}) == count
    ]
    return [Entry(engine, stage, levers) for stage in (1, 2) for levers in chosen]


def expect(entry: Entry) -> tuple[Verdict, str]:
    """What the table says of an entry, and why: of a refusal, a part of its message."""
    names, kinds = {lever.name for lever in entry.levers}, {lever.of for lever in entry.levers}
    engine, stage = entry.engine, entry.stage
    if stage == 1 and (names & PACKED or "stream" in kinds):
        return "refused", "is for a frozen tower"
    if engine == "fsdp" and "offload" in kinds:
        return "refused", "are two ways to shard: leave one out"
    if engine == "fsdp" and "optimizer" in kinds:
        return "refused", "bitsandbytes cannot update FSDP2's sharded parameters"
    if engine in ("plain", "ddp") and "offload" in kinds:
        return "refused", "offload_optimizer is for the stages 1 to 3, and stage is 0"
    if stage == 1 and "storage bf16" in names:
        return "pointless", "stage 1 keeps what it trains in the type of memory.masters; storage is not read there"
    costly = engine in ("zero3", "fsdp") or names & PACKED or "storage bf16" in names
    if "layer by layer" in names and not costly:
        return "pointless", "no layer has to be fetched, and every tubelet's hidden states are kept: chunk by chunk"
    if {"masters bf16", "autocast bf16"} <= names:
        return "pointless", "with weights in bf16 the products are in bf16 already; autocast only keeps norms in fp32"
    if engine in ("zero3", "fsdp") and names & PACKED:
        return "works", "the tower is not sharded: each rank keeps all of it in this form, or in this place"
    if engine.startswith("zero") and "masters bf16" in names:
        return "works", "ZeRO keeps an fp32 copy of its share of the weights beside it"
    return "works", ""


def run(entries: list[Entry]) -> list[list[float] | str]:
    """The outcomes of entries of one engine: losses, or the message with which one is refused."""
    outcomes: list[list[float] | str] = []
    for start in range(0, len(entries), PER_PROCESS):
        part = entries[start : start + PER_PROCESS]
        outcomes += walk(part[0].engine, [entry.cell() for entry in part], timeout=1800)
    return outcomes


def judge(entry: Entry, found: list[float] | str, base: list[float]) -> str:
    """What is wrong with an entry's outcome; nothing, where it is as the table says."""
    verdict, reason = expect(entry)
    if isinstance(found, str):
        return "" if verdict == "refused" and reason in found else f"refused: {found}"
    if verdict == "refused":
        return f"not refused ({reason})"
    apart = max(abs(own - other) for own, other in zip(found, base, strict=True))
    if not all(map(math.isfinite, found)):
        return f"losses that are no numbers: {found}"
    if found[-1] >= found[0] - 0.1:
        return f"learns nothing: {found}"
    if apart > (2e-5 if entry.exact else 0.15):
        return f"losses {found} are {apart:.2g} from {base}"
    if not entry.exact and apart == 0 and not (entry.stage == 1 and verdict == "pointless"):
        return "changed nothing"
    return ""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Walk the table and write a report."""

    engines: tuple[str, ...] = ENGINES
    """Engines to walk."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""
    kept: Path = Path("lever_pairs.jsonl")
    """Rows of the engines that are done; those are not walked again."""


def main(arguments: Arguments) -> None:
    """Walk, judge, write."""
    done = [json.loads(line) for line in arguments.kept.read_text().splitlines()] if arguments.kept.exists() else []
    rows: list[dict[str, Any]] = []
    for engine in track(arguments.engines, description="engines"):
        own = [row for row in done if row["engine"] == engine] or walk_engine(engine)
        rows += own
        arguments.kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "tower": "vit-demo",
        "frames": 8,
        "ranks": {engine: 1 if engine == "plain" else 2 for engine in arguments.engines},
    }
    device = torch.device("cpu")
    stem = write_report(arguments.results, "lever_pairs", device=device, settings=settings, rows=rows)
    print(f"wrote {stem}.json and .md")


def walk_engine(engine: str) -> list[dict[str, Any]]:
    """The rows of one engine; what is not as the table says is told."""
    entries = list_entries(engine)
    base: dict[int, list[float]] = {}
    rows = []
    for entry, found in zip(entries, run(entries), strict=True):
        if not entry.levers:
            assert not isinstance(found, str), found
            base[entry.stage] = found
        rows.append(describe(entry, found, base[entry.stage]))
        if rows[-1]["wrong"]:
            print(f"{engine}, stage {entry.stage}, {entry.names}: {rows[-1]['wrong']}", flush=True)
    return rows


def describe(entry: Entry, found: list[float] | str, base: list[float]) -> dict[str, Any]:
    """One row of the report."""
    verdict, reason = expect(entry)
    refused = isinstance(found, str)
    return {
        "engine": entry.engine,
        "stage": entry.stage,
        "levers": entry.names,
        "verdict": verdict,
        "reason": " ".join(found.split()) if isinstance(found, str) else reason,
        "last_loss": None if refused else found[-1],
        "largest_difference_of_loss": (
            None if isinstance(found, str) else max(abs(own - other) for own, other in zip(found, base, strict=True))
        ),
        "wrong": judge(entry, found, base),
        "evidence": "measured",
    }


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
