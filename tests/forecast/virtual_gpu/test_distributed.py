"""Ranks as processes over the imitated NCCL, each on its own virtual GPU, and one of many alone in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigvivit.forecast.virtual_gpu import environment, virtual_gpu
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

    with virtual_gpu("A100 80GB") as gpu:  # in one process, the same
        alone = gpu.call(programs.train_alone, engine, 0, 2)
        assert alone[0] == first["peak"]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("rank", "world"), [(5, 8), (1023, 1024)])
def test_one_rank_of_many_in_one_process(rank: int, world: int) -> None:
    """It keeps its part, and waits for nobody: each other rank says what it says."""
    with virtual_gpu("A100 80GB") as gpu:
        part, whole = gpu.call(programs.shard_alone, rank, world)
    assert part == pytest.approx(whole / world, rel=0.02)
    with virtual_gpu("A100 80GB") as gpu:
        _, objects, count = gpu.call(programs.train_alone, "ddp", rank, world)
    assert (objects, count) == ([rank] * world, world)
