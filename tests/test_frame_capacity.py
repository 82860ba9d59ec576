"""Probes of the search for the most frames: real processes, under a real limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.frame_capacity import ROOT, Arguments, main, probe
from bigvivit.forecast.virtual_gpu import environment
from bigvivit.processes import RankFailed
from bigvivit.trial import Trial
from bigvivit.units import GiB, MiB


def build(frames: int, **changes: Any) -> Trial:
    plan = {"compute": "fp32", "group": "all", "chunk": 2}
    values = {"stage": 2, "tower": "vit-b", "frames": frames, "size": 112, "layers": 1, "temporal_depth": 1}
    return Trial.from_json(json.dumps({**values, "plan": plan, **changes}))


@pytest.mark.parametrize(("hardware", "evidence"), [("T4", "virtual"), ("2GiB", "forecast")])
def test_cards_that_are_not_here(hardware: str, evidence: str, tmp_path: Path) -> None:
    """A card of the table is probed; of memory alone there is a forecast."""
    if evidence == "virtual" and torch.version.cuda is None:
        pytest.skip("PyTorch without CUDA")
    main(Arguments(hardware=hardware, layers=1, stages=(2,), plans=("paper",), most=32, results=tmp_path))
    (report,) = tmp_path.glob("*.json")
    (row,) = json.loads(report.read_text())["rows"]
    assert row["evidence"] == evidence
    assert row["forecast_frames"] == row.get("virtual_frames", 32) == 32
    assert row.get("virtual_reserved_bytes", 2 * MiB) % (2 * MiB) == 0


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch without CUDA")
def test_nothing_is_measured_on_a_virtual_gpu(tmp_path: Path) -> None:
    """The path of a local GPU runs there too, and its report says what it ran on."""
    words = ["--layers", "1", "--stages", "2", "--plans", "cpu", "--most", "16", "--results", str(tmp_path)]
    env = {**os.environ, **environment("T4")}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "bench/frame_capacity.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["machine"]["device"] == "Tesla T4 (virtual)"
    (row,) = report["rows"]
    assert (row["evidence"], row["virtual_frames"], "measured_frames" in row) == ("virtual", 16, False)


@pytest.mark.slow
def test_what_fits_says_what_it_took_and_what_does_not_is_no_failure() -> None:
    limit = int(1.35 * GiB)
    found = probe(build(4), limit, "cpu")
    assert found is not None
    assert found["data_bytes_before"] < found["data_bytes"] < limit
    assert probe(build(4000), limit, "cpu") is None


@pytest.mark.slow
def test_ranks_run_out_together() -> None:
    """The batch of one rank's clips is what does not fit; the other is ended, and one answer comes back."""
    limit = int(1.35 * GiB)
    assert probe(build(4, world=2), None, "cpu") is not None
    assert probe(build(4000, world=2), limit, "cpu") is None


@pytest.mark.slow
def test_another_failure_is_not_taken_for_one_of_memory() -> None:
    with pytest.raises(RankFailed, match="nonsense"):
        probe(build(4, tower="nonsense"), None, "cpu")
