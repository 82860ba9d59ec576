"""Many heads on one pass of the tower, by a run of one: `python -m bench.probe_bank`.

Train steps on random clips, in turn in one process: one head and a probe bank without a cache, and both from cached
vectors. Rounds are kept as they come, and an interrupted bench goes on.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench.timing import ratio, spread, time_in_turn
from bigvivit.model.catalog import SIZES
from bigvivit.training.report import run_bench, write_report
from bigvivit.training.step import train_step
from bigvivit.trial import Trial, build_trial

ONE, BANK = "one head", "probe bank"
CACHED_ONE, CACHED_BANK = "one head, cached", "probe bank, cached"
TARGET = 1.25
"""Of the bank's step by that of one head, both with the tower, at most."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time steps, and write a report."""

    tower: Literal["vit-b", "vit-l", "vit-h", "vit-g", "vit-demo"] = "vit-b"
    """Size of the tower. Its weights are drawn."""
    heads: int = 12
    """Heads of the bank."""
    frames: int = 32
    """Frames of a clip."""
    clips: int = 8
    """Clips of a micro-batch."""
    temporal_depth: int = 4
    """Layers of each temporal transformer."""
    repeats: int = 3
    """Rounds of timing."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Time all in turn, compare, write."""
    arguments.results.mkdir(parents=True, exist_ok=True)
    kept = arguments.results / "probe_bank.partial.jsonl"
    rounds = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    if len(rounds) < arguments.repeats:
        steps = {ONE: build_step(arguments, heads=1, cached=False)}
        steps[BANK] = build_step(arguments, heads=arguments.heads, cached=False)
        steps[CACHED_ONE] = build_step(arguments, heads=1, cached=True)
        steps[CACHED_BANK] = build_step(arguments, heads=arguments.heads, cached=True)
        for step in steps.values():
            step()
        while len(rounds) < arguments.repeats:
            rounds.append({name: own[0] for name, own in time_in_turn(steps, 1).items()})
            with kept.open("a") as file:
                file.write(json.dumps(rounds[-1]) + "\n")
    rows = judge({name: [single[name] for single in rounds] for name in rounds[0]}, arguments.heads)
    settings = {"tower": arguments.tower, "heads": arguments.heads, "frames": arguments.frames, "tubelet": 2,
                "local_batch": arguments.clips, "temporal_depth": arguments.temporal_depth,
                "optimizer": "sgd with momentum", "repeats": arguments.repeats, "compute": "fp32",
                "threads": torch.get_num_threads()}  # fmt: skip
    stem = write_report(arguments.results, "probe_bank", device=torch.device("cpu"), settings=settings, rows=rows)
    kept.unlink(missing_ok=True)
    for row in rows:
        print(row)
    print(f"wrote {stem}.json and .md")


def build_step(arguments: Arguments, *, heads: int, cached: bool) -> Callable[[], object]:
    """The step that training runs; a bank of one is not used: that is an ordinary run."""
    values = {
        "stage": 2, "tower": arguments.tower, "frames": arguments.frames, "size": SIZES[arguments.tower].image_size,
        "clips": arguments.clips, "temporal_depth": arguments.temporal_depth, "cached": cached,
        "depths": [arguments.temporal_depth] * heads if heads > 1 else [],
        "plan": {"storage": "fp32", "compute": "fp32", "autocast": "fp32"},
    }  # fmt: skip
    engine, batch = build_trial(Trial.from_json(json.dumps(values)), torch.device("cpu"))
    return lambda: train_step(engine, [batch])


def judge(seconds: dict[str, list[float]], heads: int) -> list[dict[str, Any]]:
    """A row for each: its time, and what it is compared with."""
    rows = []
    for name, own in seconds.items():
        row: dict[str, Any] = {"name": name, "evidence": "measured", "seconds": statistics.median(own)}
        row |= {"spread_seconds": spread(own)}
        if name == BANK:
            share = ratio(own, seconds[ONE])
            row |= {"by_one_head": share, "target": f"{'met' if share <= TARGET else 'not met'}: at most {TARGET}"}
        elif name == CACHED_BANK:
            row |= {"by_one_head": ratio(own, seconds[CACHED_ONE]), "heads": heads}
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
