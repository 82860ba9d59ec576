"""Reports of benches: the same figures for programs and for people."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from bigvivit.training.report import write_report


def test_json_and_markdown_hold_the_same(tmp_path: Path) -> None:
    rows = [{"kill": 1, "peak_bytes": 2**30, "top1": 0.5, "evidence": "measured"}]
    settings = {"engine": "zero3", "greatest_loss_difference": 0.00025, "run": {"config": "long"}}
    stem = write_report(tmp_path, "kills", device=torch.device("cpu"), settings=settings, rows=rows)
    record = json.loads(stem.with_name(f"{stem.name}.json").read_text())
    assert (record["rows"], record["settings"]) == (rows, settings)
    assert [record["versions"]["torch"], record["machine"]["cores"]] == [
        torch.__version__.partition("+")[0],
        len(os.sched_getaffinity(0)),
    ]
    page = stem.with_name(f"{stem.name}.md").read_text()
    assert "| 1 | 1 GiB | 50.0% | measured |" in page
    assert "engine zero3, greatest_loss_difference 0.00025\n" in page
    assert "long" not in page
