"""What replaying a snapshot of a million events takes: `python -m bench.replay_size`.

The snapshot is PyTorch's own, of a random program on a virtual GPU, without stacks and with Python's; `bigvivit replay`
reads it in a process of its own. Targets: 20 seconds and 1 GiB.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigvivit.forecast.virtual_gpu import virtual_gpu
from bigvivit.training.report import run_bench, write_report
from bigvivit.units import GiB

SECONDS, MEMORY = 20, GiB
STACKS = {"none": 0, "Python's, to 40 deep": 40}
"""How deep the program's functions call one another."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Record, replay, write a report."""

    events: int = 1_000_000
    """Of the allocator, at least."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def record(path: str, count: int, depth: int) -> None:
    """A program of some hundred live blocks; one in a thousand events differs in its stack from the last."""
    rng = random.Random(1)
    sizes = [round(2 ** rng.uniform(6, 24)) for _ in range(50)]
    context = "all" if depth else None
    torch.cuda.memory._record_memory_history(context=context, stacks="python", max_entries=10**7)
    live: list[int] = []

    def run(deeper: int, steps: int) -> None:
        if deeper:
            run(deeper - 1, steps)
            return
        for _ in range(steps):
            if live and (len(live) > 300 or rng.random() < 0.45):
                torch.cuda.caching_allocator_delete(live.pop(rng.randrange(len(live))))
            else:
                live.append(torch.cuda.caching_allocator_alloc(rng.choice(sizes), 0))

    for _ in range(count // 1500):  # a free is two events
        run(rng.randrange(depth) if depth else 0, 1000)
    torch.cuda.memory._dump_snapshot(path)


def measure(stacks: str, count: int) -> dict[str, Any]:
    """One row."""
    from bench import replay_size  # the child imports what it is to run by name, and this module's is `__main__`

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "snapshot.pickle")
        with virtual_gpu("A100 80GB") as gpu:
            gpu.call(replay_size.record, str(path), count, STACKS[stacks])
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-m", "bigvivit.cli", "replay", path], stdout=subprocess.PIPE)
        assert child.stdout is not None
        text = " ".join(child.stdout.read().decode().split())
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        assert status == 0, text
        size = path.stat().st_size
    return {
        "stacks": stacks,
        "evidence": "measured",
        "events": count,
        "file_bytes": size,
        "seconds": seconds,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "largest_bytes": used.ru_maxrss * 1024,
        "blocks": text.partition("The model put ")[2].partition(" blocks")[0],
        "seconds_target": "met" if seconds <= SECONDS else "not met",
        "memory_target": "met" if used.ru_maxrss * 1024 <= MEMORY else "not met",
    }


def main(arguments: Arguments) -> None:
    """Rows, report."""
    rows = [measure(stacks, arguments.events) for stacks in STACKS]
    settings = {"seconds_target": SECONDS, "target_bytes": MEMORY}
    stem = write_report(arguments.results, "replay_size", device=torch.device("cpu"), settings=settings, rows=rows)
    print(f"wrote {stem}.json and .md")


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
