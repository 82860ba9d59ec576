"""How true the virtual GPU is: `python -m bench.virtual_truth TRACES`, TRACES being the project's shared/traces.

Three reports. Recordings: programs of published recordings of real GPUs, written anew, beside them. Allocator: random
programs through PyTorch's allocator on a virtual GPU and through the allocator model. Tensors: what programs' own
tensors take by CUDA's allocator on a virtual GPU and by the CPU's.

Targets: every allocation and free is the recorded one, allocated memory equal to the byte and reserved memory within
0.2 %, by PyTorch itself where it orders cached blocks as the recorded version did, else by the model in that order; no
block of a random program elsewhere; tensors equal to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.progress import track

from bench.own_tensors import PROGRAMS, own_peak
from bigvivit.forecast.recording import Event, Trace
from bigvivit.forecast.replay import compare
from bigvivit.forecast.segments import oldest_segment_first
from bigvivit.forecast.snapshot import read_trace
from bigvivit.forecast.virtual_gpu import virtual_gpu
from bigvivit.training.report import run_bench, write_report
from bigvivit.units import GiB, MiB
from tests.forecast.virtual_gpu.agreement import run_both
from tests.forecast.virtual_gpu.recorder import number_events, play, watch
from tests.forecast.virtual_gpu.recordings import RECORDINGS, Recording

NOT_WRITTEN = {
    "Constructor-Sun": "fine-tuning of a language model by a trainer of its own: sizes alone do not say which layers",
    "HugePandaCoder": "a neural cellular automaton whose convolutions are kernels of its own and cuDNN's",
    "MercuryB1": "quantisation of a language model layer by layer: the order of its searches cannot be read from sizes",
    "bcrafton": "compiled by inductor, whose buffers are those of its version",
    "cranberrii": "4-bit weights by kernels of bitsandbytes, under a version of it that is not known",
}
"""Why the programs of the other recordings are not here, by the start of their names."""
SETTINGS: tuple[tuple[str, float, int, bool], ...] = (
    ("", 1.0, 40 * GiB, False),
    ("", 1.0, 1100 * MiB, False),
    ("expandable_segments:True", 1.0, 1300 * MiB, False),
    ("max_split_size_mb:30", 1.0, 1500 * MiB, False),
    ("garbage_collection_threshold:0.6,max_split_size_mb:40", 0.02, 40 * GiB, False),
    ("roundup_power2_divisions:4,large_segment_size_mb:64", 1.0, 40 * GiB, False),
    ("", 1.0, 1100 * MiB, True),
    ("expandable_segments:True", 1.0, 1100 * MiB, True),
    ("max_split_size_mb:30", 1.0, 1100 * MiB, True),
    ("garbage_collection_threshold:0.5", 0.02, 40 * GiB, True),
)
"""Of random programs: settings, memory fraction, memory of the card, whether other streams use blocks too."""
RESERVED_TARGET = 0.002


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Hold the virtual GPU to recordings of real ones, to the allocator model and to the CPU allocator."""

    traces: tyro.conf.Positional[Path]
    """Folder of published recordings."""
    seeds: int = 3
    """Random programs for each settings."""
    operations: int = 3000
    """Of each of them."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Three reports."""
    found = {each.name: each for each in RECORDINGS}
    names = [path.name.removesuffix(".jsonl.gz") for path in sorted(arguments.traces.glob("*.jsonl.gz"))]
    recordings = [
        hold_to(found[name], arguments.traces) if name in found else leave_out(name)
        for name in track(names, description="recordings")
    ]
    report(arguments, "recordings", recordings, {"reserved_target": RESERVED_TARGET})
    cells = [(each, seed) for each in SETTINGS for seed in range(arguments.seeds)]
    programs = [
        random_row(*each, seed, arguments.operations) for each, seed in track(cells, description="random programs")
    ]
    report(arguments, "allocator", programs, {"operations": arguments.operations})
    with virtual_gpu("A100 80GB") as gpu:
        tensors = [
            tensors_row(name, gpu.call(own_peak, name, "cuda")) for name in track(PROGRAMS, description="programs")
        ]
    report(arguments, "tensors", tensors, {})


def report(arguments: Arguments, name: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write one, and say how many rows met their target."""
    counts = {word: sum(row["target"] == word for row in rows) for word in ("met", "not met", "not judged")}
    settings |= {word.replace(" ", "_"): count for word, count in counts.items() if count}
    bench = f"virtual_truth_{name}"
    stem = write_report(arguments.results, bench, device=torch.device("cpu"), settings=settings, rows=rows)
    print(f"{name}: " + ", ".join(f"{word} {count}" for word, count in counts.items()) + f"; wrote {stem}.json and .md")


def leave_out(name: str) -> dict[str, Any]:
    """The row of a recording whose program is not written anew."""
    why = next(reason for start, reason in NOT_WRITTEN.items() if name.startswith(start))
    return {"recording": name, "evidence": "not run", "target": "not judged", "not_written": why}


def hold_to(recording: Recording, traces: Path) -> dict[str, Any]:
    """The row of a recording and its program."""
    trace = read_trace(traces / f"{recording.name}.jsonl.gz")
    with virtual_gpu("A100 80GB") as gpu:
        watched = gpu.call(watch, recording.build, recording.arguments, recording.warm)
    same_order = oldest_segment_first(torch.__version__) == oldest_segment_first(recording.torch)
    wanted, found = number_events(trace.events), number_events(watched.during)
    if recording.autocast:  # what it had cast goes at once, in the order of a hash table of addresses
        last = max(at for at, (kind, _) in enumerate(wanted) if kind == "+") + 1
        wanted, found = ([*events[:last], *sorted(events[last:], key=str)] for events in (wanted, found))
    played, recorded = play(watched, recording.torch), compare(trace)
    row: dict[str, Any] = {
        "recording": recording.name,
        "evidence": "virtual",
        "recorded_with": recording.torch,
        "same_order_of_blocks": same_order,
        "runs_before": recording.warm,
        "events": len(wanted),
        "events_that_differ": sum(ours != theirs for ours, theirs in zip(found, wanted, strict=False))
        + abs(len(found) - len(wanted)),
        "allocated_bytes": recorded.run.peak_allocated_bytes,
        "reserved_bytes": recorded.recorded_peak_reserved_bytes,
        "asked_for_off": peak_asked([*watched.before, *watched.during], len(watched.before))
        - peak_asked([*what_was_there(trace), *trace.events], len(what_was_there(trace))),
        "allocated_off": watched.peak_allocated_bytes - recorded.run.peak_allocated_bytes,
        "reserved_error": watched.peak_reserved_bytes / recorded.recorded_peak_reserved_bytes - 1,
        "allocated_off_in_its_order": played.peak_allocated_bytes - recorded.run.peak_allocated_bytes,
        "reserved_error_in_its_order": played.peak_reserved_bytes / recorded.recorded_peak_reserved_bytes - 1,
    }
    which = "" if same_order else "_in_its_order"
    met = row["events_that_differ"] == row[f"allocated_off{which}"] == 0
    met = met and abs(row[f"reserved_error{which}"]) <= RESERVED_TARGET
    return {**row, "target": "met" if met else "not met"}


def what_was_there(trace: Trace) -> list[Event]:
    """The blocks before a recording, as allocations."""
    blocks = [(segment.stream, *block) for segment in trace.initial for block in segment.live]
    return [Event("a", address, requested, stream) for stream, address, _, requested in blocks]


def peak_asked(events: list[Event], start: int) -> int:
    """Most bytes of requests that live at once, from the event `start` on."""
    live: dict[int, int] = {}
    now = peak = 0
    for place, (kind, address, size, _) in enumerate(events):
        if kind == "a":
            live[address] = size
            now += size
        elif kind == "f":
            now -= live.pop(address)
        peak = max(peak, now) if place >= start else now
    return peak


def random_row(conf: str, fraction: float, memory: int, defers: bool, seed: int, count: int) -> dict[str, Any]:
    """The row of a random program."""
    recorded, model = run_both(conf, fraction, memory, seed, defers=defers, count=count)
    pairs = list(zip(recorded.addresses, model.addresses, strict=True))
    return {
        "settings": conf or "default",
        "evidence": "virtual",
        "memory_fraction": fraction,
        "memory_bytes": memory,
        "streams": 2,
        "blocks_used_by_both": defers,
        "seed": seed,
        "requests": len(pairs),
        "out_of_memory": recorded.addresses.count(None),
        "flushes": recorded.flushes,
        "segments": len(recorded.segments),
        "reserved_bytes": recorded.peak_reserved,
        "blocks_that_differ": sum(theirs != ours for theirs, ours in pairs),
        "segments_that_differ": sum(
            theirs != ours for theirs, ours in zip(recorded.segments, model.segments, strict=False)
        )
        + abs(len(recorded.segments) - len(model.segments)),
        "target": "met" if recorded == model else "not met",
    }


def tensors_row(name: str, on_gpu: int) -> dict[str, Any]:
    """The row of a program on both devices."""
    on_cpu = own_peak(name, "cpu")
    row = {"program": name, "evidence": "virtual", "on_cpu_bytes": on_cpu, "on_gpu_bytes": on_gpu}
    return {**row, "off": on_gpu - on_cpu, "target": "met" if on_gpu == on_cpu else "not met"}


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
