"""What a real GPU says of dry runs: `python -m bench.dryrun_truth record` on one, then `... compare` anywhere.

Each program of `bench.dryrun_programs` that one GPU is enough for takes three optimizer steps on this machine's GPU,
followed by the recorder of dry runs; later it is dry-run on a virtual card of the same name with the same PyTorch. A
row is what PyTorch's allocator said at its peaks in both, and the first request in which they differ.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from bench.dryrun_programs import MINUTES, STEPS, add_packages, describe_failure, list_programs, place
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

PREPARE = "import sys; sys.path[:0] = sys.argv[2:]; from bench.dryrun_programs import *; "
PREPARE += "list_programs()[sys.argv[1]].prepare()"
"""Writes a program's data in a process of its own, in the folder that is the present one there."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Hold dry runs against a GPU."""

    what: tyro.conf.Positional[Literal["record", "compare"]]
    """`record` runs the programs on this machine's GPU; `compare` dry-runs those that were recorded."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Programs; where none is given, all that use one GPU, or all that were recorded."""
    folder: Path = Path("dryrun_truth")
    """Of the recordings."""
    packages: tuple[Path, ...] = ()
    """Folders of `pip install --target` with what only these programs need."""
    jobs: int = 2
    """Programs at a time: nothing of them is timed."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """One half."""
    add_packages(arguments.packages)
    programs = [name for name, program in list_programs().items() if program.gpus == 1]
    if unknown := [name for name in arguments.names if name not in programs]:
        raise ConfigError(f"names: {', '.join(unknown)} is none of {', '.join(programs)}")
    names = arguments.names or programs
    if arguments.what == "record":
        check_packages(names)
        facts = {"card": name_card(), "torch": torch.__version__}
        arguments.folder.mkdir(parents=True, exist_ok=True)
        (arguments.folder / "gpu.json").write_text(json.dumps(facts))
        run_each(names, arguments.jobs, lambda name: record(name, facts["card"], arguments.folder))
        return
    facts = read_recorded(arguments.folder)
    recorded = [name for name in names if (arguments.folder / f"{name}.json").exists()]
    check_packages(recorded)
    rows = run_each(recorded, arguments.jobs, lambda name: compare(name, facts["card"], arguments.folder))
    rows.sort(key=lambda row: recorded.index(row["program"]))
    settings = {"steps": STEPS, **{f"measured_{name}": value for name, value in facts.items()}}
    stem = write_report(arguments.results, "dryrun_truth", device=torch.device("cpu"), settings=settings, rows=rows)
    print(f"wrote {stem}.json and .md")


def check_packages(names: Iterable[str]) -> None:
    """Raises ConfigError for programs of packages that are not here."""
    for name in names:
        package = list_programs()[name].package
        try:
            if package is not None:
                version(package)
        except PackageNotFoundError:
            raise ConfigError(
                f"names: {name} comes in {package}, which is not installed: install it into a folder for --packages, "
                "or name other programs"
            ) from None


def read_recorded(folder: Path) -> dict[str, str]:
    """Of which card and PyTorch recordings are. Raises ConfigError where there are none, or this is another PyTorch."""
    path = folder / "gpu.json"
    if not path.exists():
        raise ConfigError(f"folder={folder} holds no recordings: make them on a GPU, with `record`")
    facts: dict[str, str] = json.loads(path.read_text())
    if facts["torch"] != torch.__version__:
        raise ConfigError(
            f"folder={folder} was recorded with torch {facts['torch']}, this is {torch.__version__}, which takes other "
            "memory: install that one here"
        )
    return facts


def run_each(names: Iterable[str], jobs: int, work: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order in which they come, each printed."""
    rows = []
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(work, name) for name in names]):
            rows.append(done.result())
            print(json.dumps(rows[-1]), flush=True)
    return rows


def name_card() -> str:
    """Of the table. Asked of another process: this one leaves the GPU to the programs."""
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    if not found:
        raise ConfigError("device: PyTorch finds no CUDA device here, and the programs are to run on one")
    return find_accelerator(found).name


def record(name: str, card: str, to: Path) -> dict[str, Any]:
    """On the GPU: what it came to, and its requests."""
    with scratch_folder() as folder:
        row = describe("measured", run_side(name, "measured", card, folder))
        for path in folder.glob("*.jsonl.gz"):
            shutil.copy(path, to / f"{name}.jsonl.gz")
        for path in folder.glob("*.pickle"):
            shutil.copy(path, to / f"{name}.pickle")
    (to / f"{name}.json").write_text(json.dumps({"program": name, **row}))
    return {"program": name, **row}


def compare(name: str, card: str, recorded: Path) -> dict[str, Any]:
    """Dry, beside what was recorded."""
    row = json.loads((recorded / f"{name}.json").read_text())
    with scratch_folder() as folder:
        outcome = run_side(name, "virtual", card, folder)
        row |= {
            "package": list_programs()[name].package,
            **describe("virtual", outcome),
            "estimates": outcome.estimates,
        }
        return row | first_difference(
            read_requests(recorded / f"{name}.jsonl.gz"), *map(read_requests, folder.glob("*.gz"))
        )


def describe(side: str, outcome: Outcome) -> dict[str, Any]:
    """Peaks, or why there are none."""
    failed = outcome.word != "fits"
    found: dict[str, Any] = {f"{side}_failure": describe_failure(outcome)[:300] if failed else None}
    for key in ("allocated", "reserved"):
        found[f"{side}_{key}_bytes"] = None if failed else outcome.peak(f"peak_{key}_bytes")
    return {**found, f"{side}_seconds": round(outcome.seconds, 1)}


def run_side(name: str, side: str, card: str, folder: Path) -> Outcome:
    """On the GPU, or on the virtual one, each in a folder of its own with the program's data."""
    request = Request(command=place(list_programs()[name].command), gpu=card, gpus=1, steps=STEPS, minutes=MINUTES)
    there = folder / "there"
    there.mkdir()
    if side == "virtual":
        environment = prepare_environment(request, folder, snapshot=False)
    else:
        paths = os.pathsep.join(part for part in (str(STARTUP), os.environ.get("PYTHONPATH", "")) if part)
        environment = {**os.environ, "PYTHONPATH": paths, **recorder_variables(request, folder, snapshot=True)}
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", PREPARE, name, root, *sys.path], cwd=there, check=True)
    words = ("env", "-C", str(there), *request.command)
    try:
        return run_recorded(replace(request, command=words), folder, environment)
    finally:
        shutil.rmtree(there)


def read_requests(path: Path) -> list[int] | None:
    """Allocations in their order, by the bytes that were asked for; None where there is no recording. When Python frees
    depends on the order of its sets, which no two processes share."""
    if not path.exists():
        return None
    with gzip.open(path, "rt") as file:
        next(file)
        return [row[2] for row in map(json.loads, file) if row[0] == "a"]


def first_difference(measured: list[int] | None, virtual: list[int] | None = None) -> dict[str, Any]:
    """Whether both asked for the same, and where not, the first request in which they part."""
    if measured is None or virtual is None:
        return {"requests": None, "same_requests": None, "differs_at": None, "difference": None}
    pairs = enumerate(itertools.zip_longest(measured, virtual))
    number, one, other = next(((number, *pair) for number, pair in pairs if pair[0] != pair[1]), (None, None, None))
    if number is None:
        return {"requests": len(measured), "same_requests": True, "differs_at": None, "difference": None}
    difference = f"measured {one} B, virtual {other} B"
    return {"requests": len(measured), "same_requests": False, "differs_at": number, "difference": difference}


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
