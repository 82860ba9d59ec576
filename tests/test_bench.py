"""What benches conclude from what they measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.stage2_memory import judge
from bench.timing import compare, ratio, time_in_turn
from bigvivit.config import ConfigError
from bigvivit.forecast.virtual_gpu import environment

BENCHES = sorted((Path(__file__).resolve().parents[1] / "bench").glob("*.py"))


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_a_bench_is_started_as_its_first_lines_say(path: Path) -> None:
    """One that imports others of its folder, or tests, cannot be started by its path."""
    text = path.read_text()
    beside = re.search(r"^from (bench|tests)\b", text, re.MULTILINE)
    said = re.search(r"`python (-m bench\.|bench/)", text)
    if beside and said:
        assert said[1] == "-m bench."


@pytest.mark.parametrize("words", [("record", "trl_sft_program"), ("compare",)])
def test_what_dry_runs_are_held_against_is_asked_for_first(words: tuple[str, ...], tmp_path: Path) -> None:
    """A package that is not here, recordings that are not there, and those of another PyTorch: one line each."""

    def call() -> str:
        command = [sys.executable, "-m", "bench.dryrun_truth", *words, "--folder", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHES[0].parents[1])
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        return done.stderr

    if words[0] == "record":
        if find_spec("trl") is not None:
            pytest.skip("trl is installed")
        assert "comes in trl, which is not installed" in call()
        return
    assert "holds no recordings" in call()
    (tmp_path / "gpu.json").write_text('{"card": "H100", "torch": "1.0"}')
    assert "was recorded with torch 1.0" in call()


def test_a_survey_of_libraries_is_the_same_twice_on_a_virtual_gpu(tmp_path: Path) -> None:
    """And is written as it goes."""
    try:
        variables = environment("H100")
    except ConfigError as error:
        pytest.skip(str(error))
    words = [sys.executable, "-m", "bench.library_scratch", "--kinds", "losses", "--results", str(tmp_path)]
    for more in ([], ["--against", str(tmp_path / "library_scratch_nvidia-h100-80gb-hbm3-(virtual).jsonl")]):
        done = subprocess.run(
            [*words, *more], capture_output=True, text=True, check=False, cwd=BENCHES[0].parents[1],
            env={**os.environ, **variables},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    (report,) = tmp_path.glob("library_scratch_error_*.json")
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["calls"], row["same"]) == (4, 4)
    assert row["estimated_bytes"] == row["measured_bytes"] > 0


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
