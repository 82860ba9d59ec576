"""Which public ways to train run on the virtual GPU: `python -m bench.dryrun_programs [NAME …] --packages FOLDER`.

The programs in bench/dryrun_programs are written as the documentation of each library shows it, and know nothing of
this project; nobody here wrote those of bench/dryrun_strangers.py, which come inside packages. Each is a dry run of
three optimizer steps. Nothing is compared with a GPU here.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.dryrun_strangers import STRANGERS, nothing
from bigvivit.forecast.dryrun.expandable import has_newer_order
from bigvivit.forecast.dryrun.launch import NO_ANSWER, Outcome, Request, dry_run, scratch_folder
from bigvivit.forecast.replay import compare
from bigvivit.forecast.snapshot import read_trace
from bigvivit.training.report import read_commit, run_bench, write_report
from bigvivit.units import format_bytes

PROGRAMS = Path(__file__).parent / "dryrun_programs"
STEPS, MINUTES = 3, 8
PLACES = {
    "accelerate_launch": (
        "accelerate_loop.py under accelerate launch", 2,
        ("accelerate", "launch", "--num_processes", "2", "--num_machines", "1", "--multi_gpu", "--mixed_precision",
         "bf16", "--dynamo_backend", "no", "--main_process_port", "29641", "accelerate_loop.py"),
    ),
    "fsdp2_loop": ("torchrun", 2, ("torchrun", "--nproc_per_node", "2", "--master_port", "29642", "fsdp2_loop.py")),
    "ddp_loop": ("torchrun", 2, ("torchrun", "--nproc_per_node", "2", "--master_port", "29643", "ddp_loop.py")),
    "deepspeed_zero": (
        "deepspeed, ZeRO-2", 2,
        ("deepspeed", "--num_gpus", "2", "--master_port", "29644", "deepspeed_zero.py", "--stage", "2"),
    ),
    "deepspeed_zero3": (
        "deepspeed, ZeRO-3", 2,
        ("deepspeed", "--num_gpus", "2", "--master_port", "29645", "deepspeed_zero.py", "--stage", "3"),
    ),
}  # fmt: skip
"""Those that are more than `python NAME.py`: started by what, on how many GPUs, how."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Dry-run public training programs."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Programs; all where none is given."""
    packages: tuple[Path, ...] = ()
    """Folders of `pip install --target` with what only these programs need."""
    gpu: str = "A100 80GB"
    """GPU of the hardware table."""
    resume: bool = False
    """Keep the rows of a run that did not come to its end."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


@dataclass(frozen=True)
class Program:
    """What is dry-run."""

    package: str | None
    """That it comes in; None where we wrote it as a library's documentation shows it."""
    started_by: str
    gpus: int
    command: tuple[str, ...]
    prepare: Callable[[], None] = nothing


def list_programs() -> dict[str, Program]:
    """By name."""
    programs = {path.stem: Program(None, "python", 1, ("python", path.name)) for path in PROGRAMS.glob("*.py")}
    programs = {name: programs[name] for name in sorted(programs) if name != "tokenizer"}
    programs |= {name: Program(None, *place) for name, place in PLACES.items()}
    for name, stranger in STRANGERS.items():
        words = tuple(shlex.split(stranger.command))
        programs[name] = Program(
            stranger.package, " ".join(words[:3] if words[0] == "python" else words[:2]), 1, words, stranger.prepare
        )
    return programs


def add_packages(folders: tuple[Path, ...]) -> None:
    """For the programs, and for what prepares their data and reads their versions."""
    for folder in (folder.resolve() for folder in reversed(folders)):
        sys.path.append(str(folder))
        for variable, path in (("PYTHONPATH", folder), ("PATH", folder / "bin")):
            os.environ[variable] = os.pathsep.join(part for part in (str(path), os.environ.get(variable)) if part)


def main(arguments: Arguments) -> None:
    """Run each, write."""
    add_packages(arguments.packages)
    programs = list_programs()
    names = arguments.names or tuple(programs)
    rows: list[dict[str, Any]] = []
    partial = arguments.results / "dryrun_programs.partial.jsonl"
    arguments.results.mkdir(parents=True, exist_ok=True)
    if arguments.resume and partial.exists():
        rows += [json.loads(line) for line in partial.read_text().splitlines()]
    else:
        partial.unlink(missing_ok=True)
    for name in names:
        if name in [row["program"] for row in rows]:
            continue
        program = programs[name]
        command = place(program.command)
        request = Request(command=command, gpu=arguments.gpu, gpus=program.gpus, steps=STEPS, minutes=MINUTES)
        row = run_program(name, request, program.prepare)
        package = program.package and f"{program.package} {version(program.package)}"
        row |= {"package": package, "started_by": program.started_by, "gpus": program.gpus, "commit": read_commit()}
        rows.append(row)
        with partial.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(f"{name}: {rows[-1]['failure'] or rows[-1]['verdict']}, {rows[-1]['seconds']:.0f} s", flush=True)
    settings = {"gpu": arguments.gpu, "steps": STEPS}
    stem = write_report(arguments.results, "dryrun_programs", device=torch.device("cpu"), settings=settings, rows=rows)
    partial.unlink()
    print(f"wrote {stem}.json and .md")


def place(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command with the programs' full paths: it runs in a scratch folder."""
    return tuple(str(PROGRAMS / word) if (PROGRAMS / word).is_file() else word for word in command)


def run_program(name: str, request: Request, prepare: Callable[[], None]) -> dict[str, Any]:
    """One row."""
    with scratch_folder() as folder, tempfile.TemporaryDirectory() as there:
        before = Path.cwd()
        os.chdir(there)
        try:
            prepare()
            outcome = dry_run(request, folder)
        finally:
            os.chdir(before)
        row = describe(name, outcome)
        row["replayed_exactly"] = replay(folder, has_newer_order(torch.__version__))
    return row


def describe(name: str, outcome: Outcome) -> dict[str, Any]:
    """What was seen of a run."""
    steps = [seconds for record in outcome.ranks for seconds in record["step_seconds"]]
    failure = None if outcome.word == "fits" else describe_failure(outcome)
    if failure is not None and outcome.timed_out:
        failure = f"not ended after {MINUTES} minutes"
    return {
        "program": name,
        "verdict": outcome.word,
        "evidence": "virtual",
        "ranks": len(outcome.ranks),
        "steps": min((record["steps"] for record in outcome.ranks), default=0),
        "peak_allocated_bytes": outcome.peak("peak_allocated_bytes"),
        "peak_reserved_bytes": outcome.peak("peak_reserved_bytes"),
        "peak_driver_bytes": outcome.peak("peak_driver_bytes"),
        "seconds": outcome.seconds,
        "seconds_per_step": sum(steps) / len(steps) if steps else None,
        "failure": failure,
    }


def docs_table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/dryrun.md."""
    names = ["program", "written by", "started by", "GPUs", "peak allocated", "peak reserved", "seconds"]
    lines = [f"| {' | '.join(names)} | |", "| --- " * 8 + "|"]
    for row in sorted(rows, key=lambda row: (row.get("package") is None, str(row["program"]))):
        sizes = [format_bytes(row[f"peak_{name}_bytes"]) for name in ("allocated", "reserved")]
        cells = [row["program"], row.get("package") or "ours", row["started_by"], str(row["gpus"])]
        cells += sizes if row["verdict"] == "fits" else "--"
        cells += [f"{row['seconds']:.0f}", row["failure"] or row["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_failure(outcome: Outcome) -> str:
    """One line: the one that names what the virtual GPU lacks, or an error's."""
    lines = outcome.tail.splitlines() or ["it printed nothing"]
    return f"{outcome.word}: {lines[0] if NO_ANSWER in lines[0] else lines[-1]}"


def replay(folder: Path, newer: bool) -> bool | None:
    """Whether the allocator model asks for every segment that PyTorch's did; None where nothing was kept."""
    events = sorted(folder.glob("*.jsonl.gz"))
    if not events:
        return None
    return all(compare(read_trace(path), oldest_segment_first=newer).exact for path in events)


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
