"""An epoch of stage 2 from a cache of the tower's vectors, by one without: `python -m bench.feature_cache`.

`bigvivit train` as its users start it, on generated clips, decoding included: a run without a cache, then one that
fills a cache in its first epoch and reads it in the others. Runs are kept as they come, and an interrupted bench goes
on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench.timing import spread
from bigvivit.data.demo import DemoConfig, write_demo
from bigvivit.training.report import run_bench, write_report

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.02
"""Of a cached epoch's time by that of one without a cache, at most."""
CLIPS = 16


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time epochs, and write a report."""

    tower: Literal["vit-b", "vit-l", "vit-h", "vit-g", "vit-demo"] = "vit-b"
    """Size of the tower. Its weights are drawn."""
    frames: int = 32
    """Frames of a clip."""
    size: int = 224
    """Side of a clip, in pixels."""
    batch_size: int = 16
    """Clips of a step; an epoch has 16."""
    temporal_depth: int = 4
    """Layers of the temporal transformer."""
    autocast: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Types that the trained part computes in, one after the other: by default fp32 on a CPU, bf16 on a GPU."""
    epochs: int = 2
    """Of the run without a cache; the fastest counts."""
    cached_epochs: int = 5
    """Epochs that the other run reads from its cache; the fastest counts."""
    scratch: Path = Path(__file__).parent / "results" / "feature_cache.partial"
    """Folder of clips, runs and cache; what is there already is not run again."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Train twice, compare, write."""
    scratch = arguments.scratch
    write_demo(DemoConfig(folder=scratch / "demo", train_clips=CLIPS, val_clips=8))
    second = ["--stage", 2, "--model.tower", arguments.tower, "--model.tower-init", "random", "--model.temporal-depth",
              arguments.temporal_depth, "--clip.frames", arguments.frames, "--optim.batch-size",
              arguments.batch_size]  # fmt: skip
    rows = []
    for autocast in arguments.autocast:
        words, cache = [*second, "--memory.autocast", autocast], scratch / f"cache_{autocast}"
        train(arguments, f"without_{autocast}", *words, "--optim.epochs", arguments.epochs)
        epochs = 1 + arguments.cached_epochs
        train(arguments, f"cached_{autocast}", *words, "--optim.epochs", epochs, "--data.cache", cache)
        without, cached = read_epochs(scratch / f"without_{autocast}"), read_epochs(scratch / f"cached_{autocast}")
        rows += [{"trained_part": autocast, **row} for row in judge(without, cached)]
    size = sum(path.stat().st_blocks * 512 for path in cache.rglob("*") if path.is_file())
    settings = {"tower": arguments.tower, "frames": arguments.frames, "size": arguments.size, "clips_per_epoch": CLIPS,
                "batch_size": arguments.batch_size, "temporal_depth": arguments.temporal_depth,
                "optimizer": "sgd with momentum", "cache_bytes": size, "threads": torch.get_num_threads()}  # fmt: skip
    stem = write_report(arguments.results, "feature_cache", device=torch.device("cpu"), settings=settings, rows=rows)
    for row in rows:
        print(row)
    print(f"wrote {stem}.json and .md; {scratch} can be deleted")


def train(arguments: Arguments, name: str, *words: object) -> None:
    """One run, unless it has finished before."""
    out = arguments.scratch / name
    if (out / "checkpoint.json").exists():
        return
    common = ["--out", out, "--data.train", arguments.scratch / "demo" / "train.csv", "--data.workers", 1,
              "--log-every", 1, "--clip.size", arguments.size, "--clip.resize", arguments.size,
              "--optim.warmup-epochs", 0, "--save-every", 0, "--device", "cpu"]  # fmt: skip
    command = [sys.executable, "-m", "bigvivit.train", *common, *words]
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)


def read_epochs(run: Path) -> list[float]:
    """Seconds of each epoch's steps, waiting for data included."""
    epochs: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        if "loss" not in record:  # what is measured before the first step
            continue
        epochs[record["epoch"]] = epochs.get(record["epoch"], 0.0) + record["seconds_per_step"]
    return [epochs[number] for number in sorted(epochs)]


def judge(without: list[float], cached: list[float]) -> list[dict[str, Any]]:
    """A row for each kind of epoch, by its fastest; the first of `cached` filled the cache and is none of them."""
    base, read = min(without), min(cached[1:])
    target = f"{'met' if read / base <= TARGET else 'not met'}: at most {TARGET}"
    row: dict[str, Any] = {"evidence": "measured"}
    return [
        {"epoch": "without a cache", **row, "seconds": base, "spread_seconds": spread(without)},
        {"epoch": "from the cache", **row, "seconds": read, "spread_seconds": spread(cached[1:]),
         "by_without": read / base, "target": target},
    ]  # fmt: skip


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
