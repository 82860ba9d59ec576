"""Ctrl-C, SIGTERM, a rank that dies, a disk that is full: what a run leaves, what it says, and how it goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigvivit.training.progress import list_checkpoints
from tests.launching import ROOT, STAGE1, Runs, command, environment, read_losses, start, train

LONG = ("--optim.epochs", 100)
DEATH_S = 60
"""README: the ranks that are left end within this time."""


class Training:
    """A training in the background, in a session of its own as a terminal would give it."""

    def __init__(self, launcher: str, out: Path, *arguments: object, **options: Any) -> None:
        self.out, self.log = out, out.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(launcher, "--out", out, *arguments),
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def wait_for_steps(self) -> None:
        self.wait_for(lambda: "step 3/" in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, rank 0 first; workers and launchers are not among them."""
        found = {}
        for process in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if "RANK" in process.environ() and "bigvivit/train.py" in words[1:3]:
                    found[int(process.environ()["RANK"])] = process
        return [found[rank] for rank in sorted(found)]

    def end(self, seconds: float = 120) -> str:
        """Wait for its end and that of all it started; what it printed."""
        self.process.wait(seconds)
        return self.log.read_text()


@pytest.mark.parametrize(
    ("launcher", "options", "number", "to"),
    [
        ("python", [], signal.SIGINT, "group"),
        pytest.param("bigvivit", ["--data.workers", 1], signal.SIGTERM, "one", marks=pytest.mark.slow),
        ("torchrun", ["--fsdp", "--data.workers", 1], signal.SIGTERM, "one"),
        pytest.param("torchrun", ["--fsdp"], signal.SIGTERM, "last rank", marks=pytest.mark.slow),
        pytest.param("accelerate", [], signal.SIGTERM, "last rank", marks=pytest.mark.slow),
        ("deepspeed", ["--ds", "ds_configs/zero2.json"], signal.SIGINT, "group"),
    ],
)
def test_asked_to_stop_it_saves_and_goes_on_later(
    launcher: str, options: list, number: signal.Signals, to: str, demo: Path, tmp_path: Path
) -> None:
    """A signal to one process, as `kill` and a scheduler send it, or to a terminal's whole group, as Ctrl-C does."""
    arguments = [*STAGE1, "--data.train", demo / "train.csv", *LONG, *options]
    run = Training(launcher, tmp_path / "run", *arguments)
    run.wait_for_steps()
    ranks = run.ranks()  # of a launcher; without one the process itself has no RANK
    assert len(ranks) == (0 if launcher in ("python", "bigvivit") else 2)
    if to == "group":
        os.killpg(run.process.pid, number)
    elif to == "last rank":
        ranks[-1].send_signal(number)
    else:
        run.process.send_signal(number)
    _, alive = psutil.wait_procs(ranks, timeout=60)  # DeepSpeed's launcher does not wait for them
    assert not alive
    printed = run.end()
    if not ranks:
        assert run.process.returncode == 75
    elif to == "last rank":  # a launcher that was sent nothing says how its ranks ended
        assert printed.count("exitcode  : 75") == 2
    (left,) = list_checkpoints(tmp_path / "run")
    step = int(left.name.removeprefix("step-"))
    assert f"{number.name}: saving after this step, then stopping" in printed or launcher == "torchrun"
    assert f"stopped after step {step} of 400, as asked: --resume goes on" in printed
    assert len(read_losses(tmp_path / "run")) == step


@pytest.mark.slow  # a full disk, below, stops and goes on too
def test_the_losses_after_a_stop_are_those_without_one(runs: Runs, demo: Path, tmp_path: Path) -> None:
    arguments = [*STAGE1, "--data.train", demo / "train.csv"]
    run = Training("python", tmp_path / "run", *arguments)
    run.wait_for_steps()
    run.process.terminate()
    run.end()
    assert 3 <= len(read_losses(tmp_path / "run")) < 8
    train("python", tmp_path / "run", *arguments, "--resume")
    assert read_losses(tmp_path / "run") == read_losses(runs["plain1"])


@pytest.mark.parametrize(
    ("launcher", "options"),
    [("torchrun", []), pytest.param("deepspeed", ["--ds", "ds_configs/zero3.json"], marks=pytest.mark.slow)],
)
def test_one_rank_killed_ends_the_others_with_the_cause_first(
    launcher: str, options: list, demo: Path, tmp_path: Path
) -> None:
    run = Training(launcher, tmp_path / "run", *STAGE1, "--data.train", demo / "train.csv", *LONG, *options)
    run.wait_for_steps()
    ranks = run.ranks()
    assert len(ranks) == 2
    ranks[1].kill()
    killed = time.monotonic()
    _, alive = psutil.wait_procs(ranks, timeout=DEATH_S)
    assert not alive
    printed = run.end(DEATH_S)
    assert time.monotonic() - killed < DEATH_S
    assert run.process.returncode != 0
    assert "error: rank 0 stops: a rank ended without a word: killed" in printed
    assert "Traceback" not in printed[: printed.index("error: rank 0 stops")]


def test_a_full_disk_is_named_and_costs_nothing_that_was_saved(runs: Runs, demo: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the kernel refuses the same writes."""
    out = tmp_path / "run"
    arguments = ["--out", out, *STAGE1, "--data.train", demo / "train.csv"]
    run = Training("python", out, *arguments[2:])
    run.wait_for_steps()
    run.process.terminate()
    run.end()
    (before,) = list_checkpoints(out)
    optimizer_bytes = (before / "optimizer.safetensors").stat().st_size  # the largest file of all

    def fill_the_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (optimizer_bytes - 1,) * 2)

    done = start("python", *arguments, "--resume", "--save-every", 1, preexec_fn=fill_the_disk)
    assert done.returncode == 2, done.stderr
    step = int(before.name.removeprefix("step-")) + 1
    assert f"error: the checkpoint of step {step} could not be written into {out}" in done.stderr
    assert "Make room, then go on from the last checkpoint with --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == [before.name]
    train("python", out, *arguments[2:], "--resume")
    assert read_losses(out) == read_losses(runs["plain1"])
