"""What each stored form costs several towers and runs: `python bench/drift.py MANIFEST SOURCE [SOURCE ...]`.

`bigvivit drift` on each, in one report.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bigvivit.drift import DriftConfig, measure_drift
from bigvivit.training.report import run_bench, write_report


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure and write a report."""

    manifest: tyro.conf.Positional[Path]
    """Clips to compare on; runs know their classes, so its labels must be theirs."""
    sources: tyro.conf.Positional[tuple[str, ...]]
    """Runs, and towers in Hugging Face format."""
    name: str = "drift"
    """Name of the report."""
    workers: int = 2
    """Processes that decode videos."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Measure each source on the CPU, then write the report."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for source in arguments.sources:
            config = DriftConfig(
                source=source,
                manifest=arguments.manifest,
                out=Path(scratch, "drift.json"),
                workers=arguments.workers,
                device="cpu",
            )
            result = measure_drift(config)
            shared = {"source": source, "clips": result["clips"], "frames": result["frames"]}
            rows += [{**shared, **row, "evidence": "measured"} for row in result["rows"]]
    settings = {"manifest": str(arguments.manifest), "compute": result["compute"]}
    stem = write_report(arguments.results, arguments.name, device=torch.device("cpu"), settings=settings, rows=rows)
    print(f"wrote {stem}.json and .md")


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
