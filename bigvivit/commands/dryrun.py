"""`bigvivit dryrun --gpu … -- COMMAND`: any training program on virtual GPUs, and what it took, on one page."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from bigvivit.calibrate.calibration import AUTO, choose
from bigvivit.config import ConfigError
from bigvivit.forecast.dryrun.expandable import try_expandable
from bigvivit.forecast.dryrun.launch import Outcome, Request, dry_run, scratch_folder
from bigvivit.forecast.dryrun.page import name_gpus, print_page, print_search
from bigvivit.forecast.dryrun.search import Search, fill, parse_template, search
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.units import format_bytes

FITS, DOES_NOT_FIT, NO_VERDICT = 0, 1, 3
MOST_GPUS = 64
EXAMPLE = 'bigvivit dryrun --gpu "2080 Ti" -- python train.py --batch-size 16'


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
    calibration: str = AUTO
    """What `bigvivit calibrate` measured on the GPU, in place of the tables' memory and context: `auto` for the newest
    in your cache folder, a file of its own, or `none`."""
    search: str | None = None
    """Find the largest value that fits, of words of the command such as `"--batch-size {}"`; each try is a run."""
    minutes: float = 30.0
    """Minutes after which a run that has not ended is ended, without a verdict."""
    snapshot: Path | None = None
    """Write the memory snapshot of rank 0, for pytorch.org/memory_viz and `bigvivit replay`."""
    sandbox: bool = False
    """Let the program write to a scratch overlay in place of the files, and tell its libraries to stay offline."""
    skip_init: bool = False
    """Leave weights that the host draws at random as they were allocated: a model may then be larger than the host."""
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
    card = choose(find_accelerator(config.gpu), config.calibration)
    request = Request(
        command=command,
        gpu=config.gpu,
        gpus=config.gpus,
        steps=config.steps,
        minutes=config.minutes,
        sandbox=config.sandbox,
        skip_init=config.skip_init,
        known=card if card.measured is not None else None,
    )
    if config.search is not None:
        sys.exit(search_value(config, request, parse_template(config.search)))
    with scratch_folder() as folder:
        say(f"running {shlex.join(command)} on {name_gpus(request)}")
        outcome = dry_run(request, folder, snapshot=config.snapshot is not None)
        if outcome.word == "out of memory":
            say("out of memory: running it again with expandable segments")
        other = try_expandable(outcome, folder)
        if config.snapshot is not None:
            keep_snapshot(folder, config.snapshot)
    if config.json:
        print(json.dumps({**to_json(outcome), "expandable_segments": other}, indent=2))
    else:
        print_page(outcome, other)
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


def keep_snapshot(folder: Path, path: Path) -> None:
    """The one that rank 0 wrote, where it used a GPU."""
    for found in sorted(folder.glob("*.pickle"))[:1]:
        shutil.copyfile(found, path)
        say(f"wrote {path}")


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Everything that was seen, for programs."""
    request = outcome.request
    return {
        "evidence": "virtual",
        "verdict": outcome.word,
        "command": list(request.command),
        "gpu": find_accelerator(request.gpu).name,
        "gpus": request.gpus,
        "calibration": asdict(request.known)["measured"] if request.known is not None else None,
        "exit_code": outcome.exit_code,
        "seconds": round(outcome.seconds, 3),
        **outcome.peaks,
        "error": outcome.error_text or None,
        "shortage": outcome.shortage,
        "shortages_caught": outcome.caught,
        "scratch_not_known": outcome.estimates,
        "ranks": list(outcome.records),
        "output_tail": outcome.tail if outcome.word in ("failed", "no GPU used") else None,
    }


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

    say(f"searching on {name_gpus(request)}")
    found = search(request.command, template, run)
    if config.json:
        print(json.dumps(search_to_json(request, template, found), indent=2))
    else:
        print_search(request, template, found)
    if found.largest is not None and found.smallest_above is not None and not found.stopped:
        return FITS
    if found.smallest_above == 1:
        return DOES_NOT_FIT
    return FITS if found.largest is not None and found.outcomes[max(found.outcomes)].word == "fits" else NO_VERDICT


def search_to_json(request: Request, template: list[str], found: Search) -> dict[str, Any]:
    """The same for programs."""
    return {
        "evidence": "virtual",
        "largest": found.largest,
        "smallest_above": found.smallest_above,
        "stopped": found.stopped or None,
        "command": None if found.largest is None else list(fill(request.command, template, found.largest)),
        "tried": [
            {"value": value, "verdict": outcome.word, "seconds": round(outcome.seconds, 3), **outcome.peaks}
            for value, outcome in sorted(found.outcomes.items())
        ],
    }
