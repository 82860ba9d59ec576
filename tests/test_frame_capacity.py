"""Probes of the search for the most frames: real processes, under a real limit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.frame_capacity import probe
from bigvivit.processes import RankFailed
from bigvivit.trial import Trial
from bigvivit.units import GiB


def build(frames: int, **changes: Any) -> Trial:
    plan = {"compute": "fp32", "group": "all", "chunk": 2}
    values = {"stage": 2, "tower": "vit-b", "frames": frames, "size": 112, "layers": 1, "temporal_depth": 1}
    return Trial.from_json(json.dumps({**values, "plan": plan, **changes}))


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
