"""A failure on one rank is told once, and the others say whose it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import environment, free_port

PROGRAM = """
import os, sys, torch, torch.distributed as dist
from bigvivit.config import ConfigError
from bigvivit.memory.ranks import start_process_group
from bigvivit.training.rank_failure import tell_failure
rank = int(os.environ["RANK"])
board = start_process_group(torch.device("cpu"), 2, deepspeed=False, fsdp=False)
try:
    {body}
    dist.all_reduce(torch.ones(1))
except (Exception, KeyboardInterrupt) as error:
    os._exit(tell_failure(error, board, rank))
"""


def run(body: str) -> tuple[list[int], list[str]]:
    """Exit codes and standard errors of two ranks."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(body=body)],
            cwd=Path(__file__).parents[2],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    return [process.returncode for process in ranks], errors


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_rank_names_the_cause(rank: int) -> None:
    codes, errors = run(f"if rank == {rank}: raise KeyError('a bug')")
    assert codes == [1, 1]
    assert f"error: rank {rank} failed:" in errors[rank]
    assert "KeyError: 'a bug'" in errors[rank].splitlines()[-1]
    assert errors[1 - rank].splitlines()[-1] == f"error: rank {1 - rank} stops: rank {rank}: KeyError: 'a bug'"
    assert "Traceback" not in errors[1 - rank]


def test_what_all_ranks_meet_is_told_once() -> None:
    codes, errors = run("raise ConfigError('lr=0 must be above 0')")
    assert codes == [2, 2]
    assert sum(error.count("error: lr=0 must be above 0") for error in errors) == 1


def test_a_rank_that_is_killed() -> None:
    codes, errors = run("if rank == 1: os.kill(os.getpid(), 9)")
    assert codes == [1, -9]
    assert "error: rank 0 stops: a rank ended without a word: killed" in errors[0]
    assert "Traceback" not in errors[0]
