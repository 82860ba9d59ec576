"""Fetching the next layer while one computes, against fetching each when it is needed: `python bench/overlap.py`.

Forwards of a frozen tower whose layers wait in the host's memory or on disk, layer by layer, both ways in turn in one
process. The page cache cannot be emptied here without root's rights over the machine, so `disk` is reading from it: a
copy by the kernel instead of one by NumPy. A real disk is slower, and has more to gain.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigvivit import assemble
from bigvivit.config import ClipConfig, ModelConfig
from bigvivit.memory.apply import apply_plan
from bigvivit.memory.placement import Fetch, Here, Placement
from bigvivit.memory.plan import MemoryPlan
from bigvivit.memory.stream import FrozenTower
from bigvivit.training.report import run_bench, write_report


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure and write a report."""

    tower: str = "vit-l"
    frames: int = 8
    chunk: int = 1
    """Tubelets that go through a layer at once."""
    repeats: int = 5
    """Forwards of each way; the median counts."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


class Waiting:
    """A placement that has every layer arrive before its fetch returns: nothing comes while anything computes."""

    def __init__(self, placement: Placement) -> None:
        self.placement, self.seconds, self.fetches = placement, 0.0, 0

    def store(self, buffer: Tensor) -> int:
        return self.placement.store(buffer)

    def fetch(self, number: int) -> Fetch:
        self.fetches += 1
        started = time.perf_counter()
        here = self.placement.fetch(number).wait()
        self.seconds += time.perf_counter() - started
        return Here(here)


def measure(arguments: Arguments, where: str, scratch: Path) -> dict[str, Any]:
    """Median seconds of a forward with and without fetching ahead, and of the copies alone."""
    config = ModelConfig(
        tower=arguments.tower, tower_init="random", tubelet=2, temporal_depth=1, temporal_input="centred"
    )
    clip = ClipConfig(frames=arguments.frames)
    source = assemble.open_tower(config, seed=0)
    model: nn.Module = assemble.build_model(source, config, clip, classes=2, adapter=False, seed=0)
    plan = MemoryPlan(storage="bf16", compute="fp32", placement=where, group="all", chunk=arguments.chunk)  # type: ignore[arg-type]
    apply_plan(model, plan, frozen=True, fill=source.fill, device=torch.device("cpu"), scratch=scratch)
    tower = model.tower
    assert isinstance(tower, FrozenTower)
    assert tower.placement is not None
    ahead, waiting = tower.placement, Waiting(tower.placement)
    clips = torch.randint(256, (arguments.frames // 2, 6, clip.size, clip.size), dtype=torch.uint8)
    seconds: dict[str, list[float]] = {"ahead": [], "waiting": []}
    outputs = {}
    tower(clips)
    for _ in range(arguments.repeats):
        for name, placement in (("ahead", ahead), ("waiting", waiting)):
            tower.placement = placement
            started = time.perf_counter()
            outputs[name] = tower(clips)
            seconds[name].append(time.perf_counter() - started)
    assert torch.equal(outputs["ahead"], outputs["waiting"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    saved, copies = medians["waiting"] - medians["ahead"], waiting.seconds / arguments.repeats
    spread = max(max(values) - min(values) for values in seconds.values())
    return {
        "placement": where,
        "tower": arguments.tower,
        "frames": arguments.frames,
        "seconds_ahead": medians["ahead"],
        "seconds_waiting": medians["waiting"],
        "seconds_of_copies": copies,
        "seconds_saved": saved,
        "largest_spread_seconds": spread,
        "share_of_copies_hidden": saved / copies if abs(saved) > spread else "not resolved",
        "evidence": "measured",
    }


def main(arguments: Arguments) -> None:
    """Measure both places, then write the report."""
    rows = [measure(arguments, where, arguments.results) for where in ("cpu", "disk")]
    settings = {"chunk": arguments.chunk, "repeats": arguments.repeats, "threads": torch.get_num_threads()}
    stem = write_report(arguments.results, "overlap", device=torch.device("cpu"), settings=settings, rows=rows)
    for row in rows:
        print(row)
    print(f"wrote {stem}.json and .md")


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
