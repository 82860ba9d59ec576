"""What rows of tests do in child processes, which find it by name."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch


def answer(value: int) -> dict[str, Any]:
    return {"value": value}


def process() -> dict[str, Any]:
    return {"value": os.getpid()}


def fail() -> dict[str, Any]:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


def end() -> dict[str, Any]:
    os._exit(3)


def hang() -> dict[str, Any]:
    time.sleep(60)
    return {}


def frames(guess: int | None) -> dict[str, Any]:
    return {"frames": guess, "beyond": False}


def walk(words: list[str], keys: list[str]) -> None:
    """The command with some of its rows only, in a process on a virtual GPU."""
    from bigvivit.calibrate import rows
    from bigvivit.commands.calibrate import calibrate

    everything = rows.list_rows

    def few(identity: dict[str, Any], towers: tuple[str, ...], out: Path) -> list[rows.Row]:
        return [row for row in everything(identity, towers, out) if any(key in row.key for key in keys)]

    with patch.object(rows, "list_rows", few):
        calibrate(words)
