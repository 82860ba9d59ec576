"""Kill a training with SIGKILL again and again, go on each time, and compare with one that was left alone.

    python bench/kill_and_resume.py                                        # one process: the same to the bit
    python bench/kill_and_resume.py --ds ds_configs/zero3.json --ranks 2   # ZeRO-3: within a tolerance

Half of the kills come at a random moment, imports and loading included; half while a checkpoint is being written.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file

from bigvivit.data.demo import DemoConfig, write_demo
from bigvivit.training.checkpoint import TRAINABLES
from bigvivit.training.progress import CHECKPOINTS, list_checkpoints
from bigvivit.training.report import run_bench, write_report

ROOT = Path(__file__).parents[1]
SETTINGS = [
    *("--stage", "1", "--clip.frames", "8", "--clip.stride", "4", "--clip.size", "48", "--clip.resize", "52"),
    *("--clip.no-flip", "--model.tower", "vit-demo", "--model.tower-init", "random", "--model.temporal-depth", "2"),
    *("--model.droplayer", "0.2", "--data.workers", "1", "--log-every", "1"),  # randomness that must be restored
    *("--optim.batch-size", "8", "--optim.lr", "0.02", "--optim.warmup-epochs", "1"),
]

LONGEST_S = 15.0
"""A third of it or more is imports and loading."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Kill, go on, compare."""

    kills: int = 20
    """How often."""
    epochs: int = 200
    """Length of the training, of 4 steps each."""
    save_every: int = 5
    """Steps between two checkpoints."""
    ds: Path | None = None
    """DeepSpeed configuration; without it plain PyTorch, or DDP on several ranks."""
    fsdp: bool = False
    """FSDP2."""
    ranks: int = 1
    """Processes, on this machine."""
    seed: int = 0
    """Of the moments."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """One run left alone, one killed; then both are compared."""
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        demo, whole, killed = (Path(folder) / name for name in ("demo", "whole", "killed"))
        write_demo(DemoConfig(folder=demo, train_clips=32, val_clips=8))
        start(arguments, demo, whole).wait()
        rows = []
        for number in track(range(arguments.kills), description="killing"):
            aim = ("a random moment", "while saving")[number % 2]
            rows.append({"kill": number + 1, "aim": aim, **kill_once(arguments, demo, killed, aim)})
        final = start(arguments, demo, killed)
        if final.wait():
            raise SystemExit(f"going on after the last kill failed: see {killed}.log")
        difference, weights = compare(whole, killed)
        engine = json.loads((whole / "run.json").read_text())["engine"]
    settings = {
        "engine": engine,
        "ranks": arguments.ranks,
        "steps": arguments.epochs * 4,
        "save_every": arguments.save_every,
        "losses_compared": len(difference),
        "greatest_loss_difference": max(difference),
        "greatest_weight_difference": weights,
        "kills_that_left_an_unfinished_checkpoint": sum(row["left_unfinished"] for row in rows),
    }
    for row in rows:
        row["evidence"] = "measured"
    stem = write_report(
        arguments.results, f"kill_and_resume_{engine}", device=torch.device("cpu"), settings=settings, rows=rows
    )
    print(json.dumps(settings, indent=2))
    print(f"wrote {stem}.json and .md")


def start(arguments: Arguments, demo: Path, out: Path) -> subprocess.Popen[bytes]:
    """The training in the background, in a session of its own."""
    program = [sys.executable, "bigvivit/train.py"]
    if arguments.ranks > 1:
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        program += [str(arguments.ranks), "bigvivit/train.py"]
    options = ["--fsdp"] if arguments.fsdp else ["--ds", str(arguments.ds)] if arguments.ds else []
    options += ["--out", str(out), "--data.train", str(demo / "train.csv"), "--optim.epochs", str(arguments.epochs)]
    options += ["--save-every", str(arguments.save_every), "--resume", "--device", "cpu"]
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [*program, *SETTINGS, *options], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def kill_once(arguments: Arguments, demo: Path, out: Path, aim: str) -> dict[str, Any]:
    """Start or go on, kill every process of it, and say what was left."""
    left_before = unfinished(out)
    process, started = start(arguments, demo, out), time.monotonic()
    moment = started + random.uniform(0.0, LONGEST_S)
    delay = random.uniform(0.0, 0.05)
    while time.monotonic() < moment if aim == "a random moment" else unfinished(out) <= left_before:
        if process.poll() is not None:
            raise SystemExit(f"the training ended with code {process.returncode} before it could be killed: {out}.log")
        time.sleep(0.001)
    if aim == "while saving":
        time.sleep(delay)
    family = descendants(process.pid)
    for pid in family:  # torchrun gives its ranks sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    checkpoints = list_checkpoints(out)
    metrics = out / "metrics.jsonl"
    return {
        "seconds_after_start": time.monotonic() - started,
        "last_logged_step": len(metrics.read_text().splitlines()) if metrics.exists() else 0,
        "left_checkpoint": checkpoints[0].name if checkpoints else None,
        "left_unfinished": bool(unfinished(out)),
    }


def unfinished(out: Path) -> set[int]:
    """Inodes of checkpoints that are being written, or were when their run was killed."""
    found = set()
    for folder in (out / CHECKPOINTS).glob(".step-*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found.add(folder.stat().st_ino)
    return found


def descendants(pid: int) -> list[int]:
    """A process and all it started, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def compare(whole: Path, killed: Path) -> tuple[list[float], float]:
    """Difference of each step's loss, and the greatest of any weight."""
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, killed)
    ]
    ours, theirs = (load_file(run / TRAINABLES) for run in (killed, whole))
    weights = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    return [abs(a - b) for a, b in zip(*losses, strict=True)], weights


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
