"""Memory of a decode worker over thousands of clips: `python bench/worker_memory.py MANIFEST`.

Reads its videos again and again through the training loader with one worker, and notes the worker's resident anonymous
memory and that of the process which trains. Each way of setting the allocator is a row.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro

from bigvivit.config import ClipConfig
from bigvivit.data.loader import build_train_loader
from bigvivit.data.manifest import read_manifest
from bigvivit.training.report import write_report


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure and write a report."""

    manifest: tyro.conf.Positional[Path]
    """Videos to read."""
    clips: int = 2000
    frames: int = 32
    size: int = 224
    settings: tuple[str, ...] = ("default", "MALLOC_ARENA_MAX=1", "MALLOC_MMAP_THRESHOLD_=1048576")
    """Environment of the worker, one row each."""
    one: bool = False
    """Measure in this process and print a row; what the rows are made of."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def measure(arguments: Arguments) -> dict[str, Any]:
    """One row."""
    manifest = read_manifest(arguments.manifest)
    resize = arguments.size * 8 // 7
    clip = ClipConfig(frames=arguments.frames, stride=1, size=arguments.size, resize=resize)
    loader = build_train_loader(clip, manifest, batch_size=4, workers=1, rank=0, world=1, seed=0)
    done, epoch, noted = 0, 0, {}
    while done < arguments.clips:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            done += len(batch.clips)
            (pid,) = loader.pool.pids
            for mark in (50, 200, arguments.clips // 2, arguments.clips):
                if done >= mark and mark not in noted:
                    noted[mark] = (psutil.Process(pid).memory_full_info().uss, psutil.Process().memory_full_info().uss)
            if done >= arguments.clips:
                break
        epoch += 1
    row: dict[str, Any] = {f"after_{mark}_bytes": worker for mark, (worker, _) in noted.items()}
    ratio = noted[arguments.clips][0] / noted[200][0]
    trainer = noted[arguments.clips][1] / noted[200][1]
    return row | {"growth_after_200": ratio, "growth_of_training_process": trainer, "evidence": "measured"}


def main(arguments: Arguments) -> None:
    """Each setting in a process of its own, then the report."""
    import json

    if arguments.one:
        print(json.dumps(measure(arguments)))
        return
    rows = []
    for setting in arguments.settings:
        changes = dict([setting.split("=")]) if "=" in setting else {}
        words = [sys.executable, __file__, str(arguments.manifest), "--one", "--clips", str(arguments.clips)]
        words += ["--frames", str(arguments.frames), "--size", str(arguments.size)]
        done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **changes})
        rows.append({"allocator": setting, **json.loads(done.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
    settings = {"clips": arguments.clips, "frames": arguments.frames, "size": arguments.size}
    stem = write_report(arguments.results, "worker_memory", device=torch.device("cpu"), settings=settings, rows=rows)
    print(f"wrote {stem}.json and .md")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
