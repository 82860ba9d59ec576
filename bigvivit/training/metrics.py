"""Where a run's numbers go: a line in `metrics.jsonl`, and the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bigvivit.training.checkpoint import explain_full_disk
from bigvivit.training.report import format_cell
from bigvivit.units import format_bytes


def lines_until(path: Path, step: int) -> Iterator[str]:
    """The records up to a step. The last line of a run that was killed may be torn; it is of a later step."""
    if step and path.exists():
        for line in path.read_text().splitlines(keepends=True):
            with suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    yield line.rstrip("\n") + "\n"


def describe_memory(record: dict[str, Any]) -> str:
    """The peak so far; on CUDA with what PyTorch reserved for it, and how often it ran into the device's end."""
    line, reserved, retries = (
        format_bytes(record["peak_bytes"]), record.get("memory.reserved_bytes"), record.get("memory.retries")
    )  # fmt: skip
    line += f" of {format_bytes(reserved)} reserved" if reserved is not None else ""
    return line + (f", {retries} retries" if retries else "")


def open_tensorboard(folder: Path, first_step: int) -> Any:
    """A writer where TensorBoard is installed, else None. What a killed run wrote after `first_step` is passed over."""
    try:  # not find_spec, which takes any folder of that name for it, such as the one a run writes
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)  # from 0 too: killed before its first checkpoint


class MetricsLog:
    """Rank 0's record of training: every reported step as JSON, a moving line on a terminal, plain lines elsewhere."""

    def __init__(self, path: Path, total_steps: int, label: str, first_step: int = 0) -> None:
        self.path, kept = path, path.with_suffix(".kept")
        with explain_full_disk(path.parent, path.name):
            kept.write_text("".join(lines_until(path, first_step)))  # the rest is redone
            os.replace(kept, path)  # at once: a run that is killed here must not lose its past
            self.file = path.open("a")
        self.total_steps = total_steps
        self.board = open_tensorboard(path.parent / "tensorboard", first_step)
        self.progress: Progress | None = None
        if sys.stdout.isatty():
            self.progress = Progress(
                TextColumn(label),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(compact=True),
                console=Console(),
            )
            self.task = self.progress.add_task(label, total=total_steps, line="")
            self.progress.start()

    def report(self, record: dict[str, Any]) -> None:
        """Write one record; `step`, `loss`, `lr`, `clips_per_second`, `peak_bytes` and `seconds_left` are shown."""
        self.write(record)
        line = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['clips_per_second']:.1f} clips/s  "
            f"{describe_memory(record)}"
        )
        if self.progress is not None:
            self.progress.update(self.task, completed=record["step"], line=line)
        else:
            left = f"{record['seconds_left']:.0f} s left"
            print(f"step {record['step']}/{self.total_steps}  {line}  {left}", flush=True)

    def report_validation(self, record: dict[str, Any]) -> None:
        """Write one record; `step`, `val_top1` and `val_loss` are shown."""
        self.write(record)
        line = f"step {record['step']}: validation top-1 {record['val_top1']:.1%}, loss {record['val_loss']:.4f}"
        if self.progress is not None:
            self.progress.console.print(line)
        else:
            print(line, flush=True)

    def write(self, record: dict[str, Any]) -> None:
        """A line that is in the file, not in a buffer, when this returns."""
        with explain_full_disk(self.path.parent, self.path.name):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            if self.board is not None:
                for key in record.keys() - {"step"}:
                    self.board.add_scalar(key, record[key], record["step"])

    def close(self) -> None:
        """Stop the moving line and close the file."""
        if self.progress is not None:
            self.progress.stop()
        with suppress(OSError):  # of a full disk, which `write` has told
            self.file.close()
        if self.board is not None:
            with suppress(OSError):
                self.board.close()


HEADS = ("head", "lr", "weight_decay", "depth", "loss", "val_top1", "val_loss")
"""Columns of a probe bank's table."""


def head_cells(entry: dict[str, Any]) -> list[str]:
    """A head's row; a dash for what one that diverged has not."""
    written = [format_cell("top1" if key == "val_top1" else key, entry[key]) or "-" for key in HEADS]
    return [*written, "best" if entry["best"] else ""]


def build_head_table(heads: list[dict[str, Any]]) -> Table:
    """A probe bank on the terminal, the best head first."""
    table = Table(*HEADS, "", title="probe bank, by validation")
    order = sorted(heads, key=lambda entry: (not entry["best"], -(entry["val_top1"] or 0.0), entry["head"]))
    for entry in order:
        table.add_row(*head_cells(entry))
    return table
