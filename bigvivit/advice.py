"""Which settings make a training step fit: the levers of a trial, tried on fake tensors, as words for a command line.
For a card of the table what would fit is run on a virtual GPU too, before it is said.

`python -m bigvivit.advice '{"trial": …, "room": …}'` prints it: a process of its own, because the one that asks has
just run out of memory.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from typing import Any

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.advisor import Changes, Forecast, Lever, Suggestion, advise
from bigvivit.memory.plan import CHUNK
from bigvivit.trial import Trial, trace_trial
from bigvivit.units import format_bytes

WANTED = 3
STEPS, ZERO_STEPS = 2, 3
"""Optimizer states are there from the first step on, DistributedDataParallel's last buckets in the second; ZeRO-3 knows
the order of its fetches in the third."""
SEEN: dict[Changes, str] = {
    "nothing": "the same numbers",
    "rounding": "rounds what is stored: look at the accuracy",
    "clips": "shows less of each clip",
}
TRAIN = {
    "frames": "--clip.frames", "optimizer": "--optim.name", "accumulate": "--optim.accumulate", "fsdp": "--fsdp",
}  # fmt: skip
PLAN = {"frames": "--frames", "optimizer": "--optimizer", "clips": "--clips", "fsdp": "--fsdp"}
"""Flags of `bigvivit train` and `bigvivit plan` by fields of a trial; those of the memory plan are the same in both."""


def build_levers(*, host: bool) -> list[Lever[Trial]]:
    """All there are. `host`: the device's memory is another than the host's, so that something can be moved there.

    The slowdowns only order. Cheapest is what costs a few more calls (chunks, micro-batches), then one more forward
    of what is trained (recompute), then what goes over a link (shards, the host, at last a disk).
    """
    levers: list[Lever[Trial]] = [
        Lever("nothing", 0.0, go_chunk_by_chunk),
        Lever("nothing", 0.02, shrink_chunks),
        Lever("nothing", 0.05, accumulate),
        Lever("nothing", 0.2, shard),
        Lever("nothing", 0.3, lambda trial: change_plan(trial, {"recompute": 1})),
        Lever("nothing", 0.4, lambda trial: move_tower(trial, host=host)),
        Lever("nothing", 0.45, shrink_groups),
        Lever("rounding", 0.05, take_codes_for_states),
        Lever("rounding", 0.1, lambda trial: change_plan(trial, {"masters": "bf16"})),
        Lever("rounding", 0.2, store_smaller),
        Lever("clips", 0.0, take_fewer_frames),
    ]
    if host:
        levers.append(Lever("nothing", 0.5, lambda trial: change_plan(trial, {"offload_activations": True})))
    return levers


def change(trial: Trial, *ways: dict[str, Any]) -> list[Trial]:
    """The trial changed in each way that is another and that is not refused."""
    changed = []
    for way in ways:
        try:
            changed.append(replace(trial, **way))
        except ConfigError:
            continue
    return [option for option in changed if option != trial]


def change_plan(trial: Trial, *ways: dict[str, Any]) -> list[Trial]:
    """`change` of settings of the memory plan."""
    plans = []
    for way in ways:
        plans.append({"plan": replace(trial.plan, **way)})
    return change(trial, *plans)


def tubelets(trial: Trial) -> int:
    """Of a micro-batch."""
    return trial.clips * trial.frames // trial.tubelet


def current_chunk(trial: Trial) -> int:
    """Tubelets that go through a layer at once, at most."""
    chunk = trial.plan.chunk
    most = tubelets(trial)
    return most if chunk == "all" else min(CHUNK if chunk == "auto" else chunk, most)


def go_chunk_by_chunk(trial: Trial) -> list[Trial]:
    """Keep hidden states of one chunk only: nothing is fetched more often where layers are there as they compute."""
    plan = trial.plan
    fetched = plan.placement != "device" or plan.storage != plan.compute or trial.fsdp or trial.ds is not None
    if trial.stage == 1 or fetched or plan.group == "auto":
        return []
    chunk = min(current_chunk(trial), CHUNK)
    return change_plan(trial, {"group": chunk, "chunk": chunk})


def shrink_chunks(trial: Trial) -> list[Trial]:
    """Fewer tubelets go through a layer at once."""
    if trial.stage == 1:
        return []
    return change_plan(trial, *({"chunk": size} for size in (8, 4, 2, 1) if size < current_chunk(trial)))


def shrink_groups(trial: Trial) -> list[Trial]:
    """Fewer hidden states at once, and each layer fetched more often."""
    chunk, group = current_chunk(trial), trial.plan.group
    now = group if isinstance(group, int) else tubelets(trial)
    if trial.stage == 1:
        return []
    return change_plan(trial, *({"group": now // part, "chunk": chunk} for part in (2, 4, 8) if now // part >= chunk))


def accumulate(trial: Trial) -> list[Trial]:
    """The same batch in more micro-batches of fewer clips."""
    ways = []
    for clips in sorted({trial.clips // part for part in (2, 4, trial.clips) if trial.clips % part == 0}, reverse=True):
        times = trial.accumulate * trial.clips // clips
        ds = trial.ds and {
            **trial.ds, "train_micro_batch_size_per_gpu": clips, "gradient_accumulation_steps": times,
        }  # fmt: skip
        ways.append({"clips": clips, "accumulate": times, "ds": ds})
    return change(trial, *ways)


def shard(trial: Trial) -> list[Trial]:
    """FSDP2 over ranks that hold everything."""
    if trial.world == 1 or trial.ds is not None or trial.optimizer.endswith("8bit"):
        return []
    return change(trial, {"fsdp": True})


def move_tower(trial: Trial, *, host: bool) -> list[Trial]:
    """A frozen tower away from the device."""
    return change_plan(trial, *({"placement": place} for place in (["cpu"] if host else []) + ["disk"]))


def take_codes_for_states(trial: Trial) -> list[Trial]:
    """The 8-bit form of the optimizer, which PyTorch's fused kernels have not."""
    if trial.fsdp or trial.fused or trial.optimizer.endswith("8bit"):
        return []
    return change(trial, {"optimizer": f"{trial.optimizer}8bit"})


def store_smaller(trial: Trial) -> list[Trial]:
    """A frozen tower in fewer bits."""
    if trial.stage == 1:  # trains it, in the type of its masters
        return []
    forms = {"fp32": ("bf16", "int8", "nf4"), "bf16": ("int8", "nf4"), "fp16": ("int8", "nf4"), "int8": ("nf4",)}
    return change_plan(trial, *({"storage": form} for form in forms.get(trial.plan.storage, ())))


def take_fewer_frames(trial: Trial) -> list[Trial]:
    """The last resort: another model would be trained."""
    parts = [part for part in (2, 4, 8) if trial.frames % (part * trial.tubelet) == 0]
    return change(trial, *({"frames": trial.frames // part} for part in parts))


def words(before: Trial, after: Trial, flags: dict[str, str]) -> str:
    """What makes a command that asked for `before` ask for `after`."""
    found = []
    for name, flag in flags.items():
        value = getattr(after, name)
        if value != getattr(before, name):
            found.append(flag if value is True else f"{flag} {value}")
    for field in fields(after.plan):
        value = getattr(after.plan, field.name)
        if value != getattr(before.plan, field.name):
            flag = f"--memory.{field.name.replace('_', '-')}"
            found.append(flag if value is True else f"{flag} {value}")
    return " ".join(found)


def suggest(trial: Trial, forecast: Callable[[Trial], Forecast], flags: dict[str, str], *, host: bool) -> Iterator[str]:
    """Lines for people: what fits, best first, as words for the command line."""
    found: list[Suggestion[Trial]] = advise(trial, build_levers(host=host), forecast, wanted=WANTED)
    if not found:
        yield "nothing that can be set makes it fit: take a smaller tower, smaller images, or more memory"
        return
    yield "settings that would make it fit, best first; add to the same command:"
    for number, suggestion in enumerate(found, start=1):
        yield f"  {number}. {words(trial, suggestion.setting, flags)}"
        peak = f"{format_bytes(suggestion.forecast.peak_bytes)} at the peak ({suggestion.forecast.evidence})"
        yield f"     {peak}; {SEEN[suggestion.changes]}"


@dataclass(frozen=True)
class Room:
    """What tensors may take, and how that is judged: on the host byte by byte, on a card by PyTorch's allocator."""

    room_bytes: int
    cuda: bool
    hardware: str | None = None
    """A card of the table, in its worst case; without it the room is what was measured."""
    calibration: str = "none"
    """What else is known of the card, as in `bigvivit plan`."""


def ask_for_advice(trial: Trial, room: Room) -> list[str]:
    """The lines that a process of its own prints; one line that says why where it cannot."""
    text = json.dumps({"trial": json.loads(trial.to_json()), "room": asdict(room)})
    # Its ranks are made up and its tensors fake: it must not take this run's place, nor the device's memory.
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in launcher}
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if room.hardware is None:
        env["CUDA_VISIBLE_DEVICES"] = ""  # it could only be in the way of the run that asks
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bigvivit.advice", text], check=False, capture_output=True, text=True, env=env
        )
    except (OSError, MemoryError) as error:
        return [f"nothing can be forecast: no process could be started for it ({error})"]
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        return [f"nothing can be forecast: {last}"]
    return done.stdout.splitlines()


def main() -> None:
    """For the process that ran out of memory."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))  # the limit is the training's; imports alone may be near it
    given = json.loads(sys.argv[1])
    trial, room = Trial.from_json(json.dumps(given["trial"])), Room(**given["room"])
    with redirect_stdout(sys.stderr):  # where libraries' warnings belong
        lines = list(explain(trial, room))
    print("\n".join(lines), flush=True)


def explain(trial: Trial, room: Room) -> Iterator[str]:
    """What would fit; for a run that failed first what its step needs, and of what that is made."""
    if room.hardware is not None:
        yield from suggest(trial, lambda setting: confirm(setting, room), PLAN, host=True)
        return
    own, composition = fit(trial, room)
    need, there = format_bytes(own.peak_bytes), format_bytes(room.room_bytes)
    yield f"forecast, by a trace of the same step: it needs {need} of tensors where there is room for {there}"
    yield from composition
    yield from suggest(trial, lambda setting: fit(setting, room)[0], TRAIN, host=room.cuda)


def confirm(trial: Trial, room: Room) -> Forecast:
    """What a trace says, which is quick; where that fits a card, what a virtual GPU says, if there can be one."""
    from bigvivit.trial_virtual import VirtualVerdict, try_virtual_gpu

    traced = fit(trial, room)[0]
    found = try_virtual_gpu(trial, find_card(room)) if traced.fits else ""
    if isinstance(found, VirtualVerdict):
        return Forecast(found.expected.allocated_bytes, found.fits[0], "virtual")
    return traced


def find_card(room: Room) -> Accelerator:
    """The card that a room is of, as `bigvivit plan` knows it; one of its bytes alone where none is named."""
    from bigvivit.calibrate.calibration import choose
    from bigvivit.forecast.hardware import accelerator_by_hand
    from bigvivit.plan import find_hardware

    if room.hardware is None:
        return accelerator_by_hand(room.room_bytes)
    return choose(find_hardware(room.hardware), room.calibration)


def fit(trial: Trial, room: Room) -> tuple[Forecast, list[str]]:
    """Whether a trial stays within the room, and what its peak is made of."""
    if trial.ds is None:
        return trace_and_fit(trial, room)
    from bigvivit.memory import zero  # noqa: F401 (once, and not in each fork)

    with get_context("fork").Pool(1) as pool:  # DeepSpeed's engine runs on fake tensors once in a process
        found: tuple[Forecast, list[str]] = pool.apply(trace_and_fit, (trial, room))
        return found


def trace_and_fit(trial: Trial, room: Room) -> tuple[Forecast, list[str]]:
    """`fit` in this process."""
    from importlib.metadata import version

    from bigvivit.forecast.alloc_conf import AllocatorSettings
    from bigvivit.forecast.allocator import Allocator
    from bigvivit.forecast.card import allocator_events, judge
    from bigvivit.forecast.composition import describe_peak
    from bigvivit.forecast.segments import oldest_segment_first
    from bigvivit.forecast.simulate import simulate

    steps, card = STEPS if trial.ds is None else ZERO_STEPS, find_card(room) if room.cuda else None
    trace = trace_trial(trial, free_bytes=room.room_bytes, host=room.cuda, card=card, steps=steps)
    peak, composition = max(trace.peak_bytes(), trace.building_peak_bytes()), list(describe_peak(trace))
    if card is not None and room.hardware is not None:
        return Forecast(peak, judge(trace, card, ranks=trial.world).fits[0]), composition
    if card is None:
        return Forecast(peak, peak <= room.room_bytes), composition
    allocator = Allocator(
        AllocatorSettings(),
        capacity_bytes=room.room_bytes,
        oldest_segment_first=oldest_segment_first(version("torch")),
    )
    run = simulate(list(allocator_events(trace)), allocator)
    return Forecast(peak, run.out_of_memory is None), composition


if __name__ == "__main__":
    main()
