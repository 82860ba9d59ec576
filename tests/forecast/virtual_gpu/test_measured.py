"""Scratch of NVIDIA's libraries, beside what an H100 was asked for (bench/results/library_scratch_*.json)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forecast.virtual_gpu import library_programs as programs

MEASURED = json.loads(
    (
        Path(__file__).parents[3] / "bench" / "results" / "library_scratch_nvidia-h100-80gb-hbm3_2026-11-26.json"
    ).read_text()
)
RECURRENT: dict[str, list[int]] = dict(MEASURED["recurrent"])
TRANSFORMS: dict[str, list[int]] = dict(MEASURED["transforms"])
MiB = 1 << 20


def test_convolutions(card: Callable[[str], Any]) -> None:
    """Most to the byte but for a note, and all together; it was 0 B before anything was measured."""
    rows = MEASURED["convolutions"]
    found = card("H100").call(programs.scratch_of_convolutions, rows)
    off = [abs(ours - row[-1]) for ours, row in zip(found, rows, strict=True)]
    assert sum(each <= 1024 for each in off) >= 0.78 * len(rows)
    assert sum(each <= MiB for each in off) >= 0.85 * len(rows)
    assert sum(found) == pytest.approx(sum(row[-1] for row in rows), rel=0.05)


@pytest.mark.parametrize("kind", ["forward", "image gradient"])
def test_convolutions_but_for_the_gradient_of_weights(card: Callable[[str], Any], kind: str) -> None:
    rows = [row for row in MEASURED["convolutions"] if row[1] == kind]
    found = card("H100").call(programs.scratch_of_convolutions, rows)
    assert sum(abs(ours - row[-1]) <= 1024 for ours, row in zip(found, rows, strict=True)) >= 0.92 * len(rows)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_networks(card: Callable[[str], Any], name: str) -> None:
    """What is kept for the backward pass to the byte, the workspace nearly."""
    measured, found = RECURRENT[name], card("H100").call(programs.requests_of_recurrent, name)
    assert len(found) == len(measured)
    for ours, theirs in zip(found, measured, strict=True):
        assert ours == (theirs if theirs < 16 * MiB or theirs % 4096 == 256 else pytest.approx(theirs, rel=0.08))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(card: Callable[[str], Any], name: str) -> None:
    """A prime length among them."""
    assert card("H100").call(programs.requests_of_transform, name) == TRANSFORMS[name]
