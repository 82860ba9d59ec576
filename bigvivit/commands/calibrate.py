"""`bigvivit calibrate`: in minutes, what this machine's GPU or CPU says of the forecasts, and constants for `plan`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from bigvivit.config import ConfigError

if TYPE_CHECKING:
    from bigvivit.calibrate.calibration import Calibration
    from bigvivit.calibrate.journal import Journal
    from bigvivit.calibrate.rows import Row
    from bigvivit.calibrate.supervisor import Session

SECONDS = {"cuda": 480.0, "cpu": 60.0, "none": 3600.0}
"""A run takes by default."""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Measure what forecasts are made of, on this machine's GPU or CPU: context, workspaces, peaks of real steps beside
    those forecast, capacities, links, rates, seconds of a step. No clips and no DeepSpeed are needed.

    Rows are kept as they come, the most valuable first; the same command goes on where a run was cut. At the end a
    report is written, and a calibration that `bigvivit plan` takes for this card from then on.
    """

    out: Path = Path("calibration")
    """Folder of the rows, the recordings of PyTorch's allocator and the report."""
    device: Literal["auto", "cpu", "cuda", "none"] = "auto"
    """What is measured: `auto` is the GPU where there is one. `none`: nothing; the virtual card and the traces answer
    for rows of an earlier run, also on a machine without its GPU, so that a rented one only has to measure."""
    seconds: float | None = None
    """Time that it may take; left out, 480 on a GPU and 60 on a CPU."""
    towers: tuple[str, ...] = ()
    """Towers whose steps are measured, with random weights, the smallest first; left out, vit-b and vit-g, on a CPU
    vit-demo."""
    only: tuple[Literal["facts", "memory", "capacity", "rates", "times"], ...] = ()
    """Groups of rows to measure; left out, all of them."""
    list: bool = False
    """Say which rows there are and what each is thought to take, and measure nothing."""

    def __post_init__(self) -> None:
        if self.seconds is not None and self.seconds <= 0:
            raise ConfigError(f"seconds={self.seconds:g} must be above 0")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"out={self.out} is a file: give a folder")


def calibrate(argv: list[str]) -> None:
    """`bigvivit calibrate`."""
    start = time.monotonic()
    config = tyro.cli(CalibrateConfig, args=argv, prog="bigvivit calibrate")

    from bigvivit.assemble import open_tower
    from bigvivit.calibrate.journal import Journal
    from bigvivit.calibrate.rows import list_rows
    from bigvivit.calibrate.supervisor import Session
    from bigvivit.config import ModelConfig

    for tower in config.towers:  # what is misspelt is said before anything is measured
        open_tower(ModelConfig(tower=tower, tower_init="random", tubelet=2), seed=0)
    identity = read_device(config.out) if config.device == "none" else find_device(config.device)
    rows = [
        row for row in list_rows(identity, config.towers, config.out) if not config.only or row.group in config.only
    ]
    if config.device == "none":
        for row in rows:
            del row.jobs["device"]
        rows = [row for row in rows if row.jobs]
    if config.list:
        for row in rows:
            print(f"{row.seconds:5.0f} s  {row.key}")
        print(f"{sum(row.seconds for row in rows):5.0f} s  all, on {identity['card']}")
        return
    journal = Journal(config.out / "rows.jsonl", identity)
    virtual, notes = find_virtual(identity, rows)
    seconds = config.seconds or SECONDS["none" if config.device == "none" else identity["device"]]
    session = Session(journal, rows, seconds=seconds - (time.monotonic() - start), virtual=virtual)
    try:
        watch(session, rows)
    finally:
        session.close()
    finish(journal, rows, config.out, notes)


def find_device(name: str) -> dict[str, Any]:
    """What is here. A GPU is asked in a process of its own: the next one measures what a first tensor costs."""
    import torch

    from bigvivit.calibrate.device import identify
    from bigvivit.forecast.virtual_gpu import VirtualGpuError
    from bigvivit.forecast.virtual_gpu.session import Child

    if name == "cpu" or not torch.cuda.is_available():
        return identify(name)
    child = Child({}, "the process that looks for the device")
    try:
        return child.call(identify, name)
    except VirtualGpuError as error:
        raise ConfigError(f"device={name}: {error}") from None
    finally:
        child.close()


def read_device(out: Path) -> dict[str, Any]:
    """Of which the rows in a folder are. Raises ConfigError where there are none, or this PyTorch is another one."""
    import torch

    from bigvivit.calibrate.device import identify
    from bigvivit.calibrate.journal import read_lines

    lines = read_lines(out / "rows.jsonl")
    if not lines:
        raise ConfigError(f"out={out} holds no rows of an earlier run: measure first, on the device")
    if missing := identify("cpu").keys() - lines[0].keys():
        raise ConfigError(
            f"{out / 'rows.jsonl'} does not begin with the device that it is of, without {', '.join(sorted(missing))}: "
            "give the --out of an earlier run"
        )
    if lines[0]["torch"] != torch.__version__:
        raise ConfigError(
            f"out={out} was measured with torch {lines[0]['torch']}, this is {torch.__version__}, which takes other "
            "memory: install that one here"
        )
    return lines[0]


def find_virtual(identity: dict[str, Any], rows: list[Row]) -> tuple[dict[str, str], list[str]]:
    """The variables of a virtual card of the same name, or none, rows that ask it no more, and a note that says why."""
    if not any("virtual" in row.jobs for row in rows):
        return {}, []
    from bigvivit.forecast.virtual_gpu import environment
    from bigvivit.forecast.virtual_gpu.session import every_gpu

    try:
        return {**environment(identity["card"]), **every_gpu(1)}, []
    except ConfigError as error:
        for row in rows:
            row.jobs.pop("virtual", None)
        return {}, [f"No virtual card stands beside it: {error}"]


def watch(session: Session, rows: list[Row]) -> None:
    """Run, with a bar and the time that is left, and a line for each row."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    from bigvivit.calibrate.page import describe_row

    class Left(ProgressColumn):
        """Of the rows that are open, as long as there is time for them."""

        def render(self, task: Task) -> Text:
            seconds = int(session.expected_seconds())
            return Text(f"{seconds // 60}:{seconds % 60:02} left")

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Left())
    with Progress(*columns, console=console) as progress:
        total = sum(len(row.jobs) for row in rows)
        there = sum((row.key, side) in session.journal.rows for row in rows for side in row.jobs)
        task = progress.add_task("rows", total=total, completed=there)

        def answered(row: dict[str, Any]) -> None:
            print(describe_row(row), flush=True)
            progress.advance(task)

        session.run(answered)


def finish(journal: Journal, rows: list[Row], out: Path, notes: list[str]) -> None:
    """Report and calibration."""
    from bigvivit.calibrate.calibration import keep, write
    from bigvivit.calibrate.constants import distil
    from bigvivit.calibrate.page import write_page

    calibration = distil(journal)
    for path in [*write_page(journal, rows, calibration, out, notes), write(calibration, out / "calibration.json")]:
        print(f"wrote {path}")
    print(say_use(calibration, keep(calibration) if is_usable(calibration) else None))


def is_usable(calibration: Calibration) -> bool:
    """Whether forecasts may take it: what a virtual card says was never measured."""
    facts = calibration.context_bytes if calibration.device == "cpu" else calibration.workspace_bytes
    return calibration.evidence == "measured" and facts is not None


def say_use(calibration: Calibration, path: Path | None) -> str:
    """The last line."""
    if calibration.evidence != "measured":
        return "on a virtual GPU nothing is measured: bigvivit plan takes nothing of this"
    if path is None:
        return "the rows of the group facts are missing: bigvivit plan takes nothing of this; run that group too"
    known = calibration.context_bytes is not None
    but = "" if known else ", but for the context: no row tells this process's memory from other programs'"
    return f"bigvivit plan takes what was measured from now on{but}, from {path}"
