"""One real stage-2 step of ViT-g with 128 frames under a limit on memory: `python bench/vit_g.py`.

The tower lives in a file in bf16, is fetched layer by layer and computes in fp32; the limit is RLIMIT_DATA.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bigvivit.config import ConfigError
from bigvivit.training.report import run_bench, write_report
from bigvivit.units import format_bytes, parse_bytes

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train ViT-g in stage 2 in a small, limited process, and report what it came to."""

    frames: int = 128
    """Frames of the clip."""
    limit: str = "2.75GiB"
    """RLIMIT_DATA of the process."""
    chunk: int = 4
    """Tubelets that go through a layer at once."""
    results: Path = ROOT / "bench" / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Run one step in a process of its own, and write the report."""
    try:
        limit = parse_bytes(arguments.limit)
    except ValueError as error:
        raise ConfigError(f"limit: {error}; give 2.75GiB, for instance") from None
    plan = {"storage": "bf16", "compute": "fp32", "placement": "disk", "group": "all", "chunk": arguments.chunk}
    trial = {"stage": 2, "tower": "vit-g", "frames": arguments.frames, "temporal_depth": 4, "plan": plan}
    done = subprocess.run(
        [sys.executable, "-m", "bigvivit.trial_run", json.dumps(trial), "1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"the step failed under {arguments.limit}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    row = {"evidence": "measured", "frames": arguments.frames, "limit_bytes": limit, **found}
    stem = write_report(arguments.results, "vit_g", device=torch.device("cpu"), settings=trial, rows=[row])
    print(f"{found['seconds_per_step']:.0f} s, peak RSS {format_bytes(found['rss_peak_bytes'])}; wrote {stem}.json")


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
