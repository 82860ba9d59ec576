"""What benches conclude from what they measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bench.stage2_memory import judge
from bench.timing import compare, ratio, time_in_turn

BENCHES = sorted((Path(__file__).resolve().parents[1] / "bench").glob("*.py"))


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_a_bench_is_started_as_its_first_lines_say(path: Path) -> None:
    """One that imports others of its folder, or tests, cannot be started by its path."""
    text = path.read_text()
    beside = re.search(r"^from (bench|tests)\b", text, re.MULTILINE)
    said = re.search(r"`python (-m bench\.|bench/)", text)
    if beside and said:
        assert said[1] == "-m bench."


def test_rivals_take_turns() -> None:
    calls: list[str] = []
    seconds = time_in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == list("abba")  # there and back
    assert {name: len(own) for name, own in seconds.items()} == {"a": 2, "b": 2}


def test_only_what_is_so_in_every_round_counts() -> None:
    assert compare([1.0, 2.0], [1.5, 2.5]) == "faster"
    assert compare([1.5, 2.5], [1.0, 2.0]) == "slower"
    assert compare([1.0, 2.5], [1.5, 2.0]) == "not resolved"
    assert ratio([1.0, 2.0, 9.0], [2.0, 2.0, 2.0]) == 1.0


def found(frames: int, passes: int, plan: str) -> dict[str, Any]:
    tubelets = frames // 2
    return {
        "frames": frames, "plan": plan, "peak_bytes": 100_000 + passes, "pass_bytes": passes, "trainable_bytes": 90_000,
        "clip_bytes": 5_000, "tower_at_home_bytes": 5_000, "fetched_bytes": 2_000, "work_bytes": 1_000,
        "hidden_bytes": tubelets * 1_000, "vectors_bytes": tubelets * 10, "tubelets_per_group": tubelets,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "few", "many", "growth", "bound"),
    [
        ("layer-major, disk", 7_000, 19_000, "met", "met"),
        ("layer-major, disk", 2_000, 21_000, "not met", "met"),
        ("layer-major, disk", 18_000, 30_000, "met", "not met"),
        ("chunk-major", 4_000, 4_120, "met", "met"),  # the vectors
        ("chunk-major", 4_000, 6_000, "not met", "met"),
    ],
)
def test_targets_of_stage_2(plan: str, few: int, many: int, growth: str, bound: str) -> None:
    row = judge({"plan": plan, "frames": 32}, found(32, many, plan), found(8, few, plan))
    assert (row["growth"], row["bound"]) == (growth, bound)


def test_a_cell_that_was_not_run_says_so() -> None:
    assert judge({"plan": "chunk-major", "frames": 8}, None, None)["evidence"] == "not run"
