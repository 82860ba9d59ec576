"""Memory that really runs out, in real trainings: one page, and its first suggestion holds under the same limit."""

from __future__ import annotations

import re
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigvivit.units import MiB
from tests.launching import Runs, start

FRAMES: list[object] = ["--clip.size", 216, "--clip.resize", 224, "--data.workers", 0, "--log-every", 1]
ONE_STEP: list[object] = ["--optim.epochs", 0.25, "--optim.warmup-epochs", 0, "--optim.lr", 0.01]
STAGE1: list[object] = [
    *("--stage", 1, "--model.tower", "vit-demo", "--model.tower-init", "random", "--model.temporal-depth", 2),
    *("--clip.frames", 32, "--optim.batch-size", 8, *FRAMES, *ONE_STEP),
]
"""Its step takes 1.55 GiB of tensors, nearly all of them activations."""
STAGE2: list[object] = [
    *("--stage", 2, "--clip.frames", 64, "--optim.batch-size", 8, *FRAMES, *ONE_STEP),
    *("--memory.group", "all", "--memory.chunk", "all"),
]
"""The paper's way: 0.6 GiB of tensors, nearly all of them a layer's work on every frame at once."""
LIMITS = {1: 1600 * MiB, 2: 1350 * MiB}
"""What a process has imported counts about 0.9 GiB of them."""


def train_under(limit: int, launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    return start(launcher, *arguments, preexec_fn=restrict)


def check_page(printed: str) -> list[str]:
    """That it is one page, and complete; the words of its first suggestion."""
    assert "Traceback" not in printed
    assert printed.count("error: out of memory on rank") == 1
    assert "you tried to allocate" in printed
    for words in ("it failed in", "tensors when it failed", "beside tensors", "imports and libraries", "forecast, by"):
        assert words in printed
    assert "largest tensors:" in printed
    first = re.search(r"^ {2}1\. (.*)$", printed, re.MULTILINE)
    assert first is not None, printed
    return first[1].split()


@pytest.fixture
def run_stage(
    request: pytest.FixtureRequest, demo: Path, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(stage: int, out: str, *more: object, launcher: str = "bigvivit") -> subprocess.CompletedProcess[str]:
        settings = STAGE1
        if stage == 2:
            runs: Runs = request.getfixturevalue("runs")
            settings = [*STAGE2, "--init-from", runs["plain1"]]
        where: list[object] = ["--out", tmp_path / out, "--data.train", demo / "train.csv"]
        return train_under(LIMITS[stage], launcher, *where, *settings, *more)

    return run


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_first_suggestion_fits_where_memory_ran_out(stage: int, run_stage: Any, tmp_path: Path) -> None:
    failed = run_stage(stage, "run")
    assert failed.returncode == 1, failed.stderr
    words = check_page(failed.stderr)
    most = {1: "activations", 2: "workspace"}[stage]
    (bar,) = (line for line in failed.stderr.splitlines() if line.startswith(f"  {most} "))
    assert bar.count("█") == 40  # the longest
    assert re.search(r"^  .*: tower\.[a-z0-9_.]+$", failed.stderr, re.MULTILINE)  # a module that made a tensor
    done = run_stage(stage, "run", *words)  # in the same folder
    assert done.returncode == 0, f"{words}\n{done.stderr}"
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "options"), [("torchrun", []), ("deepspeed", ["--ds", "ds_configs/zero2.json"])])
def test_two_ranks_say_it_once(launcher: str, options: list[str], run_stage: Any) -> None:
    """Both run out of memory in the same step, each with 8 clips."""
    failed = run_stage(1, "run", "--optim.batch-size", 16, *options, launcher=launcher)
    assert failed.returncode != 0
    ours = re.split(r"Traceback \(most recent call last\):\n.*/torchrun", failed.stdout + failed.stderr)[0]
    words = check_page(ours)  # what follows is torchrun's own end
    done = run_stage(1, "run", "--optim.batch-size", 16, *options, *words, launcher=launcher)
    assert done.returncode == 0, f"{words}\n{done.stderr}"
