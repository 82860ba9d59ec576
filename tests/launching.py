"""Starting the program as its users do."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bigvivit import cli

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

# Losses are logged in fp32; gradients are summed in another order, and eight steps of SGD amplify that.
LOSS_TOLERANCE = 2e-4
COMMON = [
    *("--data.workers", 0, "--optim.batch-size", 8, "--optim.accumulate", 2, "--optim.epochs", 2),
    *("--optim.warmup-epochs", 0.5, "--optim.lr", 0.02, "--log-every", 1, "--clip.no-flip"),
    *("--clip.size", 48, "--clip.resize", 52),
]
STAGE1 = [
    *("--stage", 1, "--clip.frames", 8, "--clip.stride", 4),
    *("--model.tower", "vit-demo", "--model.tower-init", "random", "--model.temporal-depth", 2, *COMMON),
]
STAGE2 = ["--stage", 2, "--clip.frames", 16, "--clip.stride", 2, *COMMON]
ZERO3 = ["--ds", "ds_configs/zero3.json"]


@dataclass(frozen=True)
class Runs:
    """Folders of four runs, and what each printed."""

    folder: Path
    printed: dict[str, str]

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def command(launcher: str, *arguments: object) -> list[str]:
    """The words that start train.py: in one process, or in two ranks."""
    port = str(free_port())
    words: dict[str, list[str | Path]] = {
        "python": [sys.executable, "bigvivit/train.py"],
        "bigvivit": [BIN / "bigvivit", "train"],
        "cache": [BIN / "bigvivit", "cache"],
        "deepspeed": [BIN / "deepspeed", "--num_gpus", "2", "--master_port", port, "bigvivit/train.py"],
        "torchrun": [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", port, "bigvivit/train.py"],
        "accelerate": [
            BIN / "accelerate",
            *[
                "launch",
                "--num_processes",
                "2",
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
                "--multi_gpu",
            ],
            "--main_process_port",
            port,
            "bigvivit/train.py",
        ],
    }
    return [str(word) for word in (*words[launcher], *arguments)]


def environment(**changes: str) -> dict[str, str]:
    """One thread for each process, on the CPU."""
    path = f"{BIN}:{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path, **changes}


def call(*words: object, cwd: Path = ROOT, columns: int = 160) -> subprocess.CompletedProcess[str]:
    """Run the `bigvivit` command within this process, which has imported PyTorch already."""
    argv = ["bigvivit", *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "argv", argv)
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    assert isinstance(code, int)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def start(
    launcher: str, *arguments: object, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run train.py to its end."""
    return subprocess.run(
        command(launcher, *arguments),
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**(env or {})),
        **options,
    )


def train(launcher: str, out: Path, *arguments: object, **options: Any) -> str:
    """`start` a training that must succeed; what it printed."""
    done = start(launcher, "--out", out, *arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def read_losses(run: Path) -> list[float]:
    """Loss of each step of a run that logged every step."""
    records = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]
