"""`bigvivit dryrun --gpu … -- COMMAND`: any training program on virtual GPUs, and what it took, on one page."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bigvivit.config import ConfigError
from bigvivit.forecast.alloc_conf import AllocatorSettings
from bigvivit.forecast.dryrun.launch import Outcome, Request, dry_run, scratch_folder
from bigvivit.forecast.dryrun.search import Search, fill, parse_template, search
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.replay import compare, what_if
from bigvivit.forecast.snapshot import read_trace
from bigvivit.units import format_bytes

FITS, DOES_NOT_FIT, NO_VERDICT = 0, 1, 3
EXPANDABLE = "expandable_segments:True"
MOST_GPUS = 64
EXAMPLE = 'bigvivit dryrun --gpu "2080 Ti" -- python train.py --batch-size 16'
SHOWN_LINES = 8


@dataclass(frozen=True, kw_only=True)
class DryRunConfig:
    """Run a training command, unchanged, on virtual GPUs: does it fit, and what takes the memory? Write the command
    behind `--`, with its launcher where it has one (torchrun, deepspeed, accelerate launch).

    PyTorch's CUDA build runs with its own allocator and kernel choices; only values are not computed. The program ends
    after some optimizer steps, or by itself. Data loading and all that runs on the host is real, and so are checkpoints
    and uploads: --sandbox keeps files as they are. Exit code 0: fits; 1: does not; 2: wrong usage; 3: the program
    failed of something else, or used no GPU.
    """

    gpu: str
    """GPU of the hardware table, such as `2080 Ti` or `A100 80GB`."""
    gpus: int = 1
    """How many of them the machine has."""
    steps: int = 3
    """Optimizer steps after which each rank ends; the second is the first that finds the optimizer's states there."""
    search: str | None = None
    """Find the largest value that fits, of words of the command such as `"--batch-size {}"`; each try is a run."""
    minutes: float = 30.0
    """Minutes after which a run that has not ended is ended, without a verdict."""
    snapshot: Path | None = None
    """Write the memory snapshot of rank 0, for pytorch.org/memory_viz and `bigvivit replay`."""
    sandbox: bool = False
    """Let the program write to a scratch overlay in place of the files, and tell its libraries to stay offline."""
    json: bool = False
    """Print JSON instead of a page, all in bytes."""

    def __post_init__(self) -> None:
        if not 1 <= self.gpus <= MOST_GPUS:
            raise ConfigError(f"gpus={self.gpus} must be 1 to {MOST_GPUS}")
        if self.minutes <= 0:
            raise ConfigError(f"minutes={self.minutes} must be above 0")
        if self.steps < 2:
            raise ConfigError(f"steps={self.steps} must be at least 2: the first has no optimizer states before it")
        if find_accelerator(self.gpu).capability is None:
            raise ConfigError(f"gpu={self.gpu!r} is no NVIDIA GPU: the virtual GPU runs PyTorch's CUDA build")
        if self.snapshot is not None and not self.snapshot.absolute().parent.is_dir():
            raise ConfigError(f"snapshot={self.snapshot}: {self.snapshot.parent} is not a folder; give another")
        if self.snapshot is not None and self.search is not None:
            raise ConfigError("snapshot is of one run: leave --search out, and give it the value that was found")


def dryrun(argv: list[str]) -> None:
    """`bigvivit dryrun`."""
    place = argv.index("--") if "--" in argv else len(argv)
    config = tyro.cli(DryRunConfig, args=join_search(argv[:place]), prog="bigvivit dryrun")
    command = tuple(argv[place + 1 :])
    if not command:
        raise ConfigError(f"no command is given: write it behind --, such as {EXAMPLE}")
    request = Request(
        command=command,
        gpu=config.gpu,
        gpus=config.gpus,
        steps=config.steps,
        minutes=config.minutes,
        sandbox=config.sandbox,
    )
    if config.search is not None:
        sys.exit(search_value(config, request, parse_template(config.search)))
    with scratch_folder() as folder:
        say(f"running {shlex.join(command)} on {name_gpus(config)}")
        outcome = dry_run(request, folder, snapshot=config.snapshot is not None)
        other = try_expandable(outcome, folder)
        if config.snapshot is not None:
            keep_snapshot(folder, config.snapshot)
    if config.json:
        print(json.dumps({**to_json(outcome), "expandable_segments": other}, indent=2))
    else:
        print_page(config, outcome, other)
    sys.exit({"fits": FITS, "out of memory": DOES_NOT_FIT}.get(outcome.word, NO_VERDICT))


def join_search(words: list[str]) -> list[str]:
    """`--search X` as one word: X begins with dashes, and would be taken for a flag of ours."""
    if "--search" not in words[:-1]:
        return words
    place = words.index("--search")
    return [*words[:place], f"--search={words[place + 1]}", *words[place + 2 :]]


def say(line: str) -> None:
    """Progress, where it disturbs nobody who reads the page."""
    print(line, file=sys.stderr, flush=True)


def name_gpus(config: DryRunConfig) -> str:
    """`8 virtual RTX 2080 Ti`."""
    return f"{config.gpus} virtual {find_accelerator(config.gpu).name}"


def keep_snapshot(folder: Path, path: Path) -> None:
    """The one that rank 0 wrote, where it used a GPU."""
    for found in sorted(folder.glob("*.pickle"))[:1]:
        shutil.copyfile(found, path)
        say(f"wrote {path}")


def try_expandable(outcome: Outcome, folder: Path) -> dict[str, Any] | None:
    """What `expandable_segments:True` would change. A run that fits is replayed through the allocator model; one that
    does not is run again, since nobody knows what the program would have allocated next. None where it is on already,
    or there is nothing to say."""
    if outcome.word == "out of memory":
        say(f"running it again with {EXPANDABLE}")
        with scratch_folder() as other:
            again = dry_run(replace(outcome.request, conf=EXPANDABLE), other)
        return {"by": "run again", "evidence": "virtual", "verdict": again.word, **peaks(again)}
    if outcome.word != "fits":
        return None
    fullest = max(
        ((record, device) for record in outcome.ranks for device in record["devices"]),
        key=lambda pair: pair[1]["peak_reserved_bytes"],
    )
    record, device = fullest
    events = folder / f"{record['pid']}.{device['device']}.jsonl.gz"
    if not events.exists():
        return None
    trace = read_trace(events)
    if trace.settings.expandable_segments:
        return None
    found = compare(trace)
    there = device["total_bytes"] - (device["peak_driver_bytes"] - device["peak_reserved_bytes"])
    run = what_if(trace, AllocatorSettings(expandable_segments=True), there)
    return {
        "by": "allocator model",
        "evidence": "forecast",
        "model_repeats_this_run": found.exact,
        "model_of_this_run_reserved_bytes": found.run.peak_reserved_bytes,
        "verdict": "fits" if run.out_of_memory is None else "out of memory",
        "peak_allocated_bytes": run.peak_allocated_bytes,
        "peak_reserved_bytes": run.peak_reserved_bytes,
    }


def peaks(outcome: Outcome) -> dict[str, int]:
    """The most of any rank."""
    return {key: outcome.peak(key) for key in ("peak_allocated_bytes", "peak_reserved_bytes", "peak_driver_bytes")}


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Everything that was seen, for programs."""
    request = outcome.request
    return {
        "evidence": "virtual",
        "verdict": outcome.word,
        "command": list(request.command),
        "gpu": find_accelerator(request.gpu).name,
        "gpus": request.gpus,
        "exit_code": outcome.exit_code,
        "seconds": round(outcome.seconds, 3),
        **peaks(outcome),
        "error": outcome.error_text or None,
        "shortage": outcome.shortage,
        "shortages_caught": outcome.caught,
        "ranks": list(outcome.records),
        "output_tail": outcome.tail if outcome.word in ("failed", "no GPU used") else None,
    }


def print_page(config: DryRunConfig, outcome: Outcome, other: dict[str, Any] | None) -> None:
    """One page on the terminal."""
    console = Console(highlight=False)
    console.print(
        Text(f"{shlex.join(outcome.request.command)} on {name_gpus(config)}: {outcome.word} (virtual)"), soft_wrap=True
    )
    if outcome.word in ("failed", "no GPU used"):
        for line in describe_failure(config, outcome):
            console.print(Text(line), soft_wrap=True)
        return
    for line in describe_verdict(outcome):
        console.print(Text(line), soft_wrap=True)
    console.print(table_of_ranks(outcome))
    fullest = max(outcome.ranks, key=lambda record: max(row["peak_reserved_bytes"] for row in record["devices"]))
    device = max(fullest["devices"], key=lambda row: row["peak_reserved_bytes"])
    console.print(table_of_phases(device, fullest["rank"]))
    console.print(table_of_lines(device))
    for line in [*describe_notes(outcome, device), *describe_expandable(outcome, other)]:
        console.print(Text(line), soft_wrap=True)


def describe_failure(config: DryRunConfig, outcome: Outcome) -> Iterator[str]:
    """The program's own words, where memory was not what ended it."""
    if outcome.word == "no GPU used":
        yield "The command ended well, and none of its processes used CUDA: there is nothing to judge."
    elif outcome.timed_out:
        yield f"The command had not ended after {outcome.request.minutes:g} minutes, and was ended: no verdict."
        yield "Values are not computed: a program that goes on until a value is reached never gets there."
    elif outcome.exit_code < 0:
        yield f"The command was ended by signal {-outcome.exit_code}; that is no verdict on memory."
    else:
        yield f"The command ended with exit code {outcome.exit_code}; that is no verdict on memory."
    if "invalid device ordinal" in outcome.output:
        yield f"It wants more GPUs than the {config.gpus} there were: give their number with --gpus."
    if outcome.tail:
        yield "Its last lines:"
        yield from (f"  {line}" for line in outcome.tail.splitlines())


def describe_verdict(outcome: Outcome) -> Iterator[str]:
    """By how much, and after what."""
    if outcome.word == "out of memory":
        shortage = outcome.shortage
        if outcome.error_text:
            yield f"  {outcome.error_text}"
        if shortage is not None:
            where = f", at {shortage['line']}" if shortage["line"] else ""
            yield f"  in the {name_phase(shortage['step'], shortage['phase'])}{where}"
            yield (
                f"  {format_bytes(shortage['asked_bytes'])} were asked for; {format_bytes(shortage['free_bytes'])} of "
                f"{format_bytes(shortage['total_bytes'])} were free"
            )
        return
    steps = min(record["steps"] for record in outcome.ranks)
    ended = {record["ended"] for record in outcome.ranks}
    how = "ended there" if ended == {"steps"} else "ran to its own end"
    yield f"  {steps} optimizer steps seen, then {how}; {outcome.seconds:.0f} s in all"


def name_phase(step: str | int, phase: str) -> str:
    """`backward of step 2`."""
    if phase == "loading":
        return "loading and initialisation"
    when = {"first": "the first step", "later": "later steps"}.get(str(step), f"step {step}")
    return f"{phase} of {when}"


def table_of_ranks(outcome: Outcome) -> Table:
    """One row per rank and GPU; ranks with the same peaks share one."""
    columns = ("ranks", "GPU", "peak allocated", "peak reserved", "with CUDA's own", "of the GPU", "left")
    table = Table(*(Column(name, justify="left" if name == "ranks" else "right") for name in columns))
    rows = [(record["rank"], device) for record in outcome.ranks for device in record["devices"]]

    def values(row: tuple[int, dict[str, Any]]) -> tuple[int, ...]:
        names = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_driver_bytes", "total_bytes")
        return tuple(row[1][name] for name in names)

    for (allocated, reserved, driver, total), group in groupby(sorted(rows, key=values, reverse=True), key=values):
        alike = list(group)
        table.add_row(
            fold(sorted({rank for rank, _ in alike})),
            fold(sorted({device["device"] for _, device in alike})),
            *(format_bytes(count) for count in (allocated, reserved, driver)),
            f"{driver / total:.1%}",
            format_bytes(total - driver),
        )
    return table


def fold(numbers: list[int]) -> str:
    """`0 to 7`, `0, 2`."""
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def table_of_phases(device: dict[str, Any], rank: int) -> Table:
    """What each phase took, of the fullest rank."""
    table = Table(
        "phase", Column("allocated", justify="right"), Column("reserved", justify="right"), title=f"rank {rank}"
    )
    for row in device["phases"]:
        sizes = (format_bytes(row[f"peak_{name}_bytes"]) for name in ("allocated", "reserved"))
        table.add_row(Text(name_phase(row["step"], row["phase"])), *sizes)
    return table


def table_of_lines(device: dict[str, Any]) -> Table:
    """What was alive when most was allocated, by the lines that made it."""
    right = [Column(name, justify="right") for name in ("bytes", "tensors", "largest")]
    table = Table(*right, "made in", "line of the program", "within", title="alive when most was allocated")
    for row in device["largest"][:SHOWN_LINES]:
        table.add_row(
            format_bytes(row["bytes"]),
            str(row["count"]),
            format_bytes(row["largest_bytes"]),
            row["phase"],
            Text(row["line"] or "-"),
            Text(row["inside"] or "-"),
        )
    return table


def describe_notes(outcome: Outcome, device: dict[str, Any]) -> Iterator[str]:
    """What a reader should know of how this came about."""
    if not device["phases"]:
        yield "Too many allocations to keep: phases and lines are not known, peaks are."
    if outcome.caught:
        yield f"The program went on after {outcome.caught} allocations that failed: it caught PyTorch's error itself."
    skipped = max(record["skipped_steps"] for record in outcome.ranks)
    if skipped:
        yield f"GradScaler skipped {skipped} steps: what an optimizer allocates in its first is perhaps not seen."
    if outcome.word == "fits" and not any(record["steps"] for record in outcome.ranks):
        yield "No optimizer of torch.optim stepped: this is the whole program, not a training step."
    if len(outcome.ranks) < outcome.world:
        yield f"{len(outcome.ranks)} of {outcome.world} ranks were seen."
    yield "Evidence: virtual. PyTorch's own allocator and operators ran; no kernel did, so values are meaningless."
    if not outcome.request.sandbox:
        yield "Files and uploads are the program's own business: what it writes by itself was written (or --sandbox)."


def describe_expandable(outcome: Outcome, other: dict[str, Any] | None) -> Iterator[str]:
    """What PyTorch's error messages advise, tried."""
    if other is None:
        return
    if other["by"] == "run again":
        left = "fits" if other["verdict"] == "fits" else f"ends the same way ({other['verdict']})"
        reserved = format_bytes(other["peak_reserved_bytes"])
        yield f"With PYTORCH_ALLOC_CONF={EXPANDABLE}, run again: {left}, {reserved} reserved at the peak."
        return
    reserved, own = other["peak_reserved_bytes"], other["model_of_this_run_reserved_bytes"]
    sure = "repeats this run exactly" if other["model_repeats_this_run"] else f"gives {format_bytes(own)} for this run"
    end = "" if other["verdict"] == "fits" else f", {other['verdict']}"
    yield (
        f"With PYTORCH_ALLOC_CONF={EXPANDABLE}: {format_bytes(reserved)} reserved at the peak{end}, in place of "
        f"{format_bytes(outcome.peak('peak_reserved_bytes'))} (forecast, by our allocator model, which {sure})."
    )


def search_value(config: DryRunConfig, request: Request, template: list[str]) -> int:
    """Find, say and return the exit code."""
    tried = 0

    def run(command: tuple[str, ...], value: int) -> Outcome:
        nonlocal tried
        tried += 1
        with scratch_folder() as folder:
            outcome = dry_run(replace(request, command=command), folder)
        reserved = format_bytes(outcome.peak("peak_reserved_bytes"))
        say(f"run {tried}: {config.search} = {value}: {outcome.word}, {reserved} reserved, {outcome.seconds:.0f} s")
        return outcome

    say(f"searching on {name_gpus(config)}")
    found = search(request.command, template, run)
    if config.json:
        print(json.dumps(search_to_json(request, template, found), indent=2))
    else:
        print_search(config, request, template, found)
    if found.largest is not None and found.smallest_above is not None and not found.stopped:
        return FITS
    if found.smallest_above == 1:
        return DOES_NOT_FIT
    return FITS if found.largest is not None and found.outcomes[max(found.outcomes)].word == "fits" else NO_VERDICT


def print_search(config: DryRunConfig, request: Request, template: list[str], found: Search) -> None:
    """The answer, and all values that were tried."""
    console = Console(highlight=False)
    table = Table(Column("value", justify="right"), "verdict", *(Column(n, justify="right") for n in PEAK_HEADINGS))
    for value, outcome in sorted(found.outcomes.items()):
        table.add_row(str(value), outcome.word, *(format_bytes(size) for size in peaks(outcome).values()))
    console.print(table)
    if found.largest is None:
        last = found.outcomes[min(found.outcomes)]
        answer = "even 1 does not fit" if found.smallest_above == 1 else "no value was found that fits"
        console.print(Text(f"{name_gpus(config)}: {answer} (virtual)"), soft_wrap=True)
        for line in describe_verdict(last) if last.word == "out of memory" else describe_failure(config, last):
            console.print(Text(line), soft_wrap=True)
    else:
        best = shlex.join(fill(request.command, template, found.largest))
        console.print(
            Text(f"{name_gpus(config)}: the largest that fits is {found.largest} (virtual): {best}"), soft_wrap=True
        )
    if found.stopped:
        console.print(Text(f"The search ended early: {found.stopped}."), soft_wrap=True)


PEAK_HEADINGS = ("peak allocated", "peak reserved", "with CUDA's own")


def search_to_json(request: Request, template: list[str], found: Search) -> dict[str, Any]:
    """The same for programs."""
    return {
        "evidence": "virtual",
        "largest": found.largest,
        "smallest_above": found.smallest_above,
        "stopped": found.stopped or None,
        "command": None if found.largest is None else list(fill(request.command, template, found.largest)),
        "tried": [
            {"value": value, "verdict": outcome.word, "seconds": round(outcome.seconds, 3), **peaks(outcome)}
            for value, outcome in sorted(found.outcomes.items())
        ],
    }
