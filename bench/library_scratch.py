"""What NVIDIA's libraries take as scratch: `python -m bench.library_scratch` on a GPU, or on a virtual one.

A survey of calls, each with the bytes that the library asked PyTorch's allocator for beside what the call returns:
convolutions of public networks in every element type and layout, recurrent networks, attention, Fourier transforms,
dense solvers, sparse products. `--against` a real GPU's survey says how far a virtual one is off. No survey of a real
GPU is here yet: what a virtual one takes was fitted to other calls (docs/virtual_gpu.md).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.library_calls import SURVEYS, Call
from bigvivit.assemble import choose_device
from bigvivit.config import ConfigError
from bigvivit.training.report import describe_device, read_commit, run_bench, write_report


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ask NVIDIA's libraries for their scratch."""

    kinds: tuple[str, ...] = tuple(SURVEYS)
    """Kinds of calls."""
    seconds: float = 600.0
    """After which no further kind, element type or layout is begun."""
    against: Path | None = None
    """A report of another GPU: how far this one's scratch is from it, kind by kind."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Ask, and write as the answers come."""
    device = choose_device("cuda")
    if unknown := [kind for kind in arguments.kinds if kind not in SURVEYS]:
        raise ConfigError(f"kinds: {', '.join(unknown)} is none of {', '.join(SURVEYS)}")
    end, name = time.monotonic() + arguments.seconds, describe_device(device)
    facts = {"card": name, "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "commit": read_commit()}
    calls = arguments.results / f"library_scratch_{'-'.join(name.lower().split())}.jsonl"
    calls.parent.mkdir(parents=True, exist_ok=True)
    with calls.open("w") as file:
        file.write(json.dumps(facts) + "\n")
        for kind in arguments.kinds:
            start, count = time.monotonic(), 0
            for row in survey(kind, SURVEYS[kind](device), end):
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
                count += 1
            print(f"{kind}: {count} calls, {time.monotonic() - start:.0f} s", flush=True)
    print(f"wrote {calls}")
    if arguments.against is not None:
        rows = list(compare(read_calls(calls), read_calls(arguments.against)))
        settings = {"against": arguments.against.name}
        stem = write_report(arguments.results, "library_scratch_error", device=device, settings=settings, rows=rows)
        print(f"wrote {stem}.json and .md")


def read_calls(path: Path) -> dict[tuple[str, str], Any]:
    """Bytes of scratch by kind and call."""
    lines = path.read_text().splitlines()[1:]
    return {(kind, what): scratch for kind, what, scratch, _ in map(json.loads, lines)}


def survey(kind: str, calls: Iterator[Call], end: float) -> Iterator[list[Any]]:
    """[kind, what was called, bytes of scratch, bytes that stay] of each, or why it failed and None."""
    for what, prepare in calls:
        if time.monotonic() > end:
            break
        try:
            yield [kind, what, *scratch_of(prepare())]
        except (RuntimeError, NotImplementedError) as error:
            yield [kind, what, str(error).splitlines()[0], None]


def scratch_of(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes asked for at the most at a time beside those that are held when the call has returned, and those."""
    key = "requested_bytes.all"
    before = torch.cuda.memory_stats()[f"{key}.current"]
    torch.cuda.reset_peak_memory_stats()
    output = work()
    after = torch.cuda.memory_stats()
    del output
    held = after[f"{key}.current"]
    return int(after[f"{key}.peak"] - max(held, before)), int(held - before)


def compare(found: dict[tuple[str, str], Any], measured: dict[tuple[str, str], Any]) -> Iterator[dict[str, Any]]:
    """A row of each kind: how many calls have the very same scratch, and all of it together."""
    for kind in dict.fromkeys(kind for kind, _ in found):
        pairs = [(found[call], measured.get(call)) for call in found if call[0] == kind]
        both = [(ours, theirs) for ours, theirs in pairs if isinstance(ours, int) and isinstance(theirs, int)]
        if both:
            yield {
                "kind": kind,
                "calls": len(both),
                "same": sum(ours == theirs for ours, theirs in both),
                "within_a_mebibyte": sum(abs(ours - theirs) <= 1 << 20 for ours, theirs in both),
                "measured_bytes": sum(theirs for _, theirs in both),
                "estimated_bytes": sum(ours for ours, _ in both),
            }


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
