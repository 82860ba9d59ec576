"""Ranks in fresh processes: what each printed, or how the first one that failed did."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class RankFailed(RuntimeError):  # noqa: N818 (not every failure is an error: a probe looks for one)
    """One rank ended with something else than 0; the others were ended."""

    def __init__(self, code: int, errors: str) -> None:
        self.code, self.errors = code, errors
        super().__init__(f"exit code {code}: {errors[-3000:]}")


def run_ranks(
    words: list[str],
    world: int = 1,
    *,
    environment: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Run `python words …` as so many ranks. Returns the JSON each printed last; raises RankFailed.

    `before` runs in each new process before Python starts.
    """
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}.out" for rank in range(world)]
        errors = [Path(folder) / f"{rank}.err" for rank in range(world)]
        ranks = []
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with outputs[rank].open("w") as out, errors[rank].open("w") as err:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, *words], cwd=ROOT, stdout=out, stderr=err,
                        env={**os.environ, **common, **own, **(environment or {})},
                        preexec_fn=before,  # noqa: PLW1509 (no threads here)
                    )
                )  # fmt: skip
        try:
            wait_for_all(ranks, errors)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [json.loads(output.read_text().strip().splitlines()[-1]) for output in outputs]


def wait_for_all(ranks: list[subprocess.Popen[bytes]], errors: list[Path]) -> None:
    """Until all have ended well; raises RankFailed for the first that has not."""
    waiting = dict(enumerate(ranks))
    while waiting:
        for rank, process in list(waiting.items()):
            code = process.poll()
            if code == 0:
                del waiting[rank]
            elif code is not None:
                raise RankFailed(code, errors[rank].read_text())
        time.sleep(0.05)
