"""What `bigvivit dryrun` prints of a run, and of a search: one page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bigvivit.forecast.dryrun.expandable import EXPANDABLE
from bigvivit.forecast.dryrun.launch import PEAKS, Outcome, Request
from bigvivit.forecast.dryrun.search import Search, fill
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.units import format_bytes

SHOWN_LINES = 8
NOT_KNOWN = {
    "convolutions": "{} convolutions ran whose scratch in cuDNN is an estimate.",
    "recurrent networks": "{} passes of recurrent networks ran whose space in cuDNN is an estimate.",
    "Fourier transforms": "{} Fourier transforms ran whose scratch in cuFFT is an estimate.",
    "dense solvers": "{} calls of cuSOLVER ran whose scratch is an estimate.",
    "sparse products": "{} calls of cuSPARSE ran whose scratch is an estimate.",
    "CTC losses": "{} connectionist losses (ctc_loss) ran whose scratch in cuDNN is an estimate.",
}
"""What is said of each of `virtual_gpu.estimates`."""
PEAK_HEADINGS = ("peak allocated", "peak reserved", "with CUDA's own")


def name_gpus(request: Request) -> str:
    """`8 virtual RTX 2080 Ti`."""
    return f"{request.gpus} virtual {find_accelerator(request.gpu).name}"


def print_page(outcome: Outcome, other: dict[str, Any] | None) -> None:
    """One page on the terminal."""
    console = Console(highlight=False)
    console.print(
        Text(f"{shlex.join(outcome.request.command)} on {name_gpus(outcome.request)}: {outcome.word} (virtual)"),
        soft_wrap=True,
    )
    known = outcome.request.known
    measured = known.measured if known is not None else None
    if measured is not None and measured.context_bytes is not None:
        console.print(f"  context {format_bytes(measured.context_bytes[1])}, {measured.where}", soft_wrap=True)
    if outcome.word in ("failed", "no GPU used"):
        for line in describe_failure(outcome):
            console.print(Text(line), soft_wrap=True)
        return
    for line in describe_verdict(outcome):
        console.print(Text(line), soft_wrap=True)
    console.print(table_of_ranks(outcome))
    record, device = outcome.fullest
    console.print(table_of_phases(device, record["rank"]))
    console.print(table_of_lines(device))
    for line in [*describe_notes(outcome, device), *describe_expandable(outcome, other)]:
        console.print(Text(line), soft_wrap=True)


def describe_failure(outcome: Outcome) -> Iterator[str]:
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
        yield f"It wants more GPUs than the {outcome.request.gpus} there were: give their number with --gpus."
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
    columns = ("ranks", "GPU", *PEAK_HEADINGS, "of the GPU", "left")
    table = Table(*(Column(name, justify="left" if name == "ranks" else "right") for name in columns))
    rows = [(record["rank"], device) for record in outcome.ranks for device in record["devices"]]

    def values(row: tuple[int, dict[str, Any]]) -> tuple[int, ...]:
        names = (*PEAKS, "total_bytes")
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
    yield from (NOT_KNOWN[name].format(f"{count:,}") for name, count in outcome.estimates.items())
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


def print_search(request: Request, template: list[str], found: Search) -> None:
    """The answer, and all values that were tried."""
    console = Console(highlight=False)
    table = Table(Column("value", justify="right"), "verdict", *(Column(n, justify="right") for n in PEAK_HEADINGS))
    for value, outcome in sorted(found.outcomes.items()):
        table.add_row(str(value), outcome.word, *(format_bytes(size) for size in outcome.peaks.values()))
    console.print(table)
    if found.largest is None:
        last = found.outcomes[min(found.outcomes)]
        answer = "even 1 does not fit" if found.smallest_above == 1 else "no value was found that fits"
        console.print(Text(f"{name_gpus(request)}: {answer} (virtual)"), soft_wrap=True)
        for line in describe_verdict(last) if last.word == "out of memory" else describe_failure(last):
            console.print(Text(line), soft_wrap=True)
    else:
        best = shlex.join(fill(request.command, template, found.largest))
        console.print(
            Text(f"{name_gpus(request)}: the largest that fits is {found.largest} (virtual): {best}"), soft_wrap=True
        )
    if found.stopped:
        console.print(Text(f"The search ended early: {found.stopped}."), soft_wrap=True)
