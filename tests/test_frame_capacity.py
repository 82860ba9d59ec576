"""Probes of the search for the most frames: real processes, under a real limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.frame_capacity import Arguments, main, probe
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
