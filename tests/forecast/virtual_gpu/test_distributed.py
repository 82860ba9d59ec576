"""Ranks as processes over the imitated NCCL, each on its own virtual GPU, and a fake process group in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigvivit.forecast.virtual_gpu import environment
from tests.forecast.virtual_gpu import programs

RANK = Path(__file__).with_name("rank.py")
PARAMETERS = 4 * (2 * 256 * 1024 + 1024 + 256)


def launch(engine: str, tmp_path: Path) -> list[dict[str, Any]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    env = {**os.environ, **environment("A100 80GB", gpus=2), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(RANK), engine]
    done = subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda line: line["rank"])


@pytest.mark.parametrize(
    "engine", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("library")
def test_ranks_train_and_talk(engine: str, tmp_path: Path) -> None:
    first, second = launch(engine, tmp_path)
    for rank, found in enumerate((first, second)):
        assert (found["rank"], found["device"], found["other"]) == (rank, rank, 0)
        assert (found["lengths"], found["told"], found["count"]) == ([5, 105], ["from rank 0"], 3)
    assert first["peak"] == second["peak"]
    whole = 4 * 4 * PARAMETERS  # fp32 parameters, gradients and two states
    if engine == "ddp":
        assert first["peak"] > whole
    else:
        assert 0.5 * whole < first["peak"]
        assert first["peak"] - 3 * 8_519_680 < whole  # workspaces apart; half of it, and buffers


@pytest.mark.usefixtures("library")
def test_one_rank_of_many_in_one_process(card: Callable[[str], Any]) -> None:
    """What a rank of eight keeps: an eighth."""
    eighth, whole = card("A100 80GB").call(programs.shard_alone, 8)
    assert eighth == pytest.approx(whole / 8, rel=0.02)
