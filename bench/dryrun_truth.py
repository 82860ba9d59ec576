"""What a real GPU says of dry runs: `python -m bench.dryrun_truth [NAME ...] --packages FOLDER --jobs 8`.

Each program of `bench.dryrun_programs` that one GPU is enough for takes three optimizer steps twice: on this machine's
GPU, and dry on a virtual card of the same name with the same PyTorch. The same recorder counts in both. A row is what
PyTorch's allocator said at its peaks, and the first allocation in which the two differ.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.dryrun_programs import MINUTES, STEPS, Program, add_packages, describe_failure, list_programs, place
from bigvivit.config import ConfigError
from bigvivit.forecast.dryrun.launch import (
    Outcome,
    Request,
    prepare_environment,
    recorder_variables,
    run_recorded,
    scratch_folder,
)
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.virtual_gpu.session import STARTUP
from bigvivit.training.report import run_bench, write_report

PREPARE = "import sys; sys.path[:0] = sys.argv[3:]; from bench.dryrun_programs import *; "
PREPARE += "list_programs()[sys.argv[1]].prepare()"
"""Writes a program's data in a process of its own, in the folder that is the present one there."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Hold dry runs against this machine's GPU."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Programs; where none is given, all that use one GPU."""
    packages: tuple[Path, ...] = ()
    """Folders of `pip install --target` with what only these programs need."""
    jobs: int = 4
    """Programs at a time: nothing of them is timed."""
    keep: Path | None = None
    """Folder for the recordings of both."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Both runs of each, write."""
    card = name_card()
    add_packages(arguments.packages)
    programs = {name: program for name, program in list_programs().items() if program.gpus == 1}
    if unknown := [name for name in arguments.names if name not in programs]:
        raise ConfigError(f"names: {', '.join(unknown)} is none of {', '.join(programs)}")
    names = arguments.names or tuple(programs)
    rows = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        started = [pool.submit(compare_program, name, programs[name], card, arguments.keep) for name in names]
        for done in as_completed(started):
            rows.append(done.result())
            print(json.dumps(rows[-1]), flush=True)
    rows.sort(key=lambda row: names.index(row["program"]))
    settings = {"card": card, "steps": STEPS}
    stem = write_report(arguments.results, "dryrun_truth", device=torch.device("cuda"), settings=settings, rows=rows)
    print(f"wrote {stem}.json and .md")


def name_card() -> str:
    """Of the table. Asked of another process: this one leaves the GPU to the programs."""
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    if not found:
        raise ConfigError("device: PyTorch finds no CUDA device here, and the programs are to run on one")
    return find_accelerator(found).name


def compare_program(name: str, program: Program, card: str, keep: Path | None) -> dict[str, Any]:
    """One row."""
    request = Request(command=place(program.command), gpu=card, gpus=1, steps=STEPS, minutes=MINUTES)
    row: dict[str, Any] = {"program": name, "package": program.package}
    events: dict[str, list[int] | None] = {}
    for side in ("measured", "virtual"):
        with scratch_folder() as folder:
            outcome = run_side(name, side, request, folder)
            failed = outcome.word != "fits"
            row[f"{side}_failure"] = describe_failure(outcome)[:300] if failed else None
            for key in ("allocated", "reserved"):
                row[f"{side}_{key}_bytes"] = None if failed else outcome.peak(f"peak_{key}_bytes")
            row[f"{side}_seconds"] = round(outcome.seconds, 1)
            events[side] = None if failed else read_requests(folder)
            if side == "virtual":
                row["estimates"] = outcome.estimates
            if keep is not None:
                shutil.copytree(folder, keep / name / side, dirs_exist_ok=True)
    return row | first_difference(events["measured"], events["virtual"])


def run_side(name: str, side: str, request: Request, folder: Path) -> Outcome:
    """On the GPU, or on the virtual one, each in a folder of its own with the program's data."""
    there = folder / "there"
    there.mkdir()
    if side == "virtual":
        environment = prepare_environment(request, folder, snapshot=True)
    else:
        paths = os.pathsep.join(part for part in (str(STARTUP), os.environ.get("PYTHONPATH", "")) if part)
        environment = {**os.environ, "PYTHONPATH": paths, **recorder_variables(request, folder, snapshot=True)}
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", PREPARE, name, "", root, *sys.path], cwd=there, check=True)
    words = ("env", "-C", str(there), *request.command)
    try:
        return run_recorded(replace(request, command=words), folder, environment)
    finally:
        shutil.rmtree(there)


def read_requests(folder: Path) -> list[int] | None:
    """Allocations in their order, by the bytes that were asked for; None where the recording is not whole. When Python
    frees depends on the order of its sets, which no two processes share."""
    files = sorted(folder.glob("*.jsonl.gz"))
    if len(files) != 1:
        return None
    with gzip.open(files[0], "rt") as file:
        next(file)
        rows = [json.loads(line) for line in file]
    return [size for kind, _, size, _ in rows if kind == "a"]


def first_difference(measured: list[int] | None, virtual: list[int] | None) -> dict[str, Any]:
    """Whether both asked for the same, and where not, the first request in which they part."""
    if measured is None or virtual is None:
        return {"requests": None, "same_requests": None, "differs_at": None, "difference": None}
    for number, (one, other) in enumerate(itertools.zip_longest(measured, virtual)):
        if one != other:
            break
    else:
        return {"requests": len(measured), "same_requests": True, "differs_at": None, "difference": None}
    difference = f"measured {one} B, virtual {other} B"
    return {"requests": len(measured), "same_requests": False, "differs_at": number, "difference": difference}


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
