"""What replaying a snapshot of a million events takes: `python -m bench.replay_size`.

The snapshot is PyTorch's own, of a random program on a virtual GPU, without stacks and with Python's; `bigvivit replay`
reads it in a process of its own. Files of gigabytes are the one without stacks, given deep ones in PyTorch's form: in
one half of the events of frames that came before, in the other partly of new ones. Targets: 1 GiB, and 20 seconds but
for files of gigabytes, which are held to a minute for each.
"""

from __future__ import annotations

import os
import pickle
import random
import resource
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

SECONDS, SECONDS_PER_GIB, MEMORY = 20, 60, GiB
EXPANDABLE = "expandable_segments:True"
NEW_FRAMES = 4
"""In every second stack of a file of gigabytes; all others occurred before."""
REPLAY = """
import atexit, runpy, sys
status = lambda: open("/proc/self/status").read()
atexit.register(lambda: print(status().partition("VmHWM:")[2].split()[0], file=sys.stderr))
runpy.run_module("bigvivit.cli", run_name="__main__", alter_sys=True)
"""
"""Ends with what it had in memory at most: `wait4` counts what this process has, torch and all, as the child's."""


@dataclass(frozen=True)
class Kind:
    """One snapshot."""

    stacks: str
    depth: int = 0
    """How deep the program's functions call one another."""
    deepened: bool = False
    """Whether stacks are added until the file has the size that was asked for."""
    conf: str = ""


KINDS = (
    Kind("none"),
    Kind("Python's, to 40 deep", depth=40),
    Kind("deep", deepened=True),
    Kind("deep", deepened=True, conf=EXPANDABLE),
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Record, replay, write a report."""

    events: int = 1_000_000
    """Of the allocator, at least."""
    gigabytes: float = 1.1
    """GiB of the files with deep stacks."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def record(path: str, count: int, depth: int, conf: str) -> None:
    """A program of some hundred live blocks; one in a thousand events differs in its stack from the last."""
    if conf:
        torch._C._accelerator_setAllocatorSettings(conf)
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


def deepen(path: str, size: int) -> None:
    """Give the events of a snapshot stacks as PyTorch has them, dicts that occur again and again in lists of their own,
    so that the file has about `size` bytes."""
    with open(path, "rb") as file:
        data = pickle.load(file)  # our own
    rng = random.Random(2)
    events = [event for events in data["device_traces"] for event in events]
    frames = [new_frame(number) for number in range(10_000)]
    depth = (size - os.path.getsize(path)) // len(events) // 5 - NEW_FRAMES * 10  # a reference has 5 bytes, a frame 100
    for number, event in enumerate(events):
        start = rng.randrange(len(frames) - 2 * depth)
        event["frames"] = frames[start : start + rng.randrange(2 * depth)]
        if number % 2:
            event["frames"][:0] = [new_frame(-number) for _ in range(NEW_FRAMES)]
    with open(path, "wb") as file:
        pickle.dump(data, file)


def new_frame(number: int) -> dict[str, Any]:
    """As of a function of its own."""
    return {
        "name": f"forward_{number}",
        "filename": f"/some/where/site-packages/model_{number}.py",
        "line": number % 999,
    }


def measure(kind: Kind, arguments: Arguments) -> dict[str, Any]:
    """One row."""
    from bench import replay_size  # the child imports what it is to run by name, and this module's is `__main__`

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "snapshot.pickle")
        with virtual_gpu("A100 80GB") as gpu:
            gpu.call(replay_size.record, str(path), arguments.events, kind.depth, kind.conf)
            if kind.deepened:
                gpu.call(replay_size.deepen, str(path), int(arguments.gigabytes * GiB))
        start = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-c", REPLAY, "replay", str(path)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = time.perf_counter() - start
        size = path.stat().st_size
    text, largest = " ".join(done.stdout.split()), int(done.stderr.split()[-1]) * 1024
    limit = max(SECONDS, SECONDS_PER_GIB * size / GiB) if kind.deepened else SECONDS
    return {
        "stacks": kind.stacks,
        "settings": kind.conf or "default",
        "evidence": "measured",
        "events": arguments.events,
        "file_bytes": size,
        "seconds": seconds,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "largest_bytes": largest,
        "blocks": text.partition("The model put ")[2].partition(" blocks")[0],
        "seconds_target": "met" if seconds <= limit else "not met",
        "memory_target": "met" if largest <= MEMORY else "not met",
    }


def main(arguments: Arguments) -> None:
    """Rows, report."""
    rows = [measure(kind, arguments) for kind in KINDS]
    settings = {"seconds_target": SECONDS, "seconds_per_gib_target": SECONDS_PER_GIB, "target_bytes": MEMORY}
    stem = write_report(arguments.results, "replay_size", device=torch.device("cpu"), settings=settings, rows=rows)
    print(f"wrote {stem}.json and .md")


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
