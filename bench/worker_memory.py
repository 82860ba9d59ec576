"""Memory of a decode worker over thousands of clips: `python bench/worker_memory.py MANIFEST`.

Reads its videos again and again through the training loader with one worker, and notes what memory is the worker's
alone (unique set size: slots of clips are shared and of a fixed size), and how that of the process that trains grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro

from bigvivit.config import ClipConfig
from bigvivit.data.loader import build_train_loader
from bigvivit.data.manifest import read_manifest
from bigvivit.training.report import run_bench, write_report


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure and write a report."""

    manifest: tyro.conf.Positional[Path]
    """Videos to read."""
    clips: int = 2000
    frames: int = 64
    size: int = 224
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def measure(arguments: Arguments) -> dict[str, Any]:
    """Unique memory at some counts of clips, in bytes, and its growth from 200 on."""
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
    """Measure, then write the report."""
    settings = {"clips": arguments.clips, "frames": arguments.frames, "size": arguments.size}
    rows = [measure(arguments)]
    stem = write_report(arguments.results, "worker_memory", device=torch.device("cpu"), settings=settings, rows=rows)
    print(rows[0])
    print(f"wrote {stem}.json and .md")


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
