"""A trial run for real, and what its memory came to: `python -m bigvivit.trial_run '{"stage": 2, "tower": "vit-b",
"frames": 8}'` measures one rank of it on the CPU.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from bigvivit import assemble
from bigvivit.forecast.trace import STEPS, repeat_batch
from bigvivit.memory.measure import count_cpu_allocations, measure_data, measure_peak
from bigvivit.memory.ranks import start_process_group
from bigvivit.memory.stream import FrozenTower
from bigvivit.model.tubelet import to_tubelets
from bigvivit.training.step import train_step
from bigvivit.trial import Trial, build_trial, import_early


def measure_trial(trial: Trial, steps: int = STEPS) -> int:
    """Peak bytes of PyTorch's CPU allocator over real steps, by its own count. The process group must be there."""
    return locate_peak(trial, steps)[0]


def locate_peak(trial: Trial, steps: int = STEPS) -> tuple[int, str]:
    """`measure_trial`, and the operator that ran at the peak."""
    device = torch.device("cpu")
    with count_cpu_allocations() as building:
        engine, batch = build_trial(trial, device)
        batches = repeat_batch(batch, trial.accumulate)
    with count_cpu_allocations(operators=True) as training:
        for _ in range(steps):
            train_step(engine, batches)
    return building.left_bytes + training.peak_bytes, training.peak_operator


def measure_parts(trial: Trial) -> dict[str, float]:
    """One real step of stage 2 by the CPU allocator's count, with the tower's part of it apart.

    The optimizer's state is there beforehand, as it is in every step but the first. The process group must be there.
    """
    device = torch.device("cpu")
    import_early(trial)
    imports = measure_peak(device).peak_bytes
    with count_cpu_allocations() as building:
        engine, batch = build_trial(trial, device)
        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        optimizer: torch.optim.Optimizer = engine.optimizer  # type: ignore[attr-defined]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    tower, backward, vectors = engine.module.tower, engine.backward, 0
    assert isinstance(tower, FrozenTower), "of stage 2"
    times: list[int] = []

    def end_tower(tower: FrozenTower, inputs: Any, output: torch.Tensor) -> None:
        nonlocal vectors
        times.append(time.time_ns())
        vectors = output.nbytes

    def begin_backward(loss: torch.Tensor) -> None:
        times.append(time.time_ns())
        backward(loss)

    tower.register_forward_pre_hook(lambda *_: times.append(time.time_ns()))
    tower.register_forward_hook(end_tower)
    engine.backward = begin_backward  # type: ignore[method-assign]
    start = time.perf_counter()
    with count_cpu_allocations() as step:
        train_step(engine, [batch])
        seconds, rss = time.perf_counter() - start, measure_peak(device).peak_bytes
    first, last, turn = times
    pixels = to_tubelets(batch.clips, trial.tubelet)
    stream, (hidden, work) = tower.stream(pixels), tower.bytes_per_tubelet(pixels)
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    at_home = [*tower.parameters(), *getattr(tower.placement, "buffers", ())]
    in_tower = step.peak_between(first, last)
    return {
        "seconds_per_step": seconds,
        "peak_bytes": building.left_bytes + step.peak_bytes,
        "rss_peak_bytes": rss,
        "rss_imports_bytes": imports,
        "tower_peak_bytes": building.left_bytes + in_tower,
        "trainable_bytes": 2 * sum(weight.nbytes for weight in trained) + sum(value.nbytes for value in states),
        "clip_bytes": batch.clips.nbytes,
        "tower_at_home_bytes": sum(kept.nbytes for kept in at_home),
        "temporal_bytes": step.live_at(turn) - step.live_at(first),
        "vectors_bytes": vectors,
        "pass_bytes": in_tower - step.live_at(first),
        "hidden_bytes": stream.group * hidden,
        "fetched_bytes": tower.fetched_bytes(),
        "work_bytes": stream.chunk * work,
        "tubelets_per_group": stream.group,
        "tubelets_per_chunk": stream.chunk,
    }


def run_trial(trial: Trial, steps: int, device: torch.device) -> dict[str, float]:
    """Real steps without the allocator's count, which itself takes memory: what the process came to."""
    engine, batch = build_trial(trial, device)
    batches = repeat_batch(batch, trial.accumulate)
    seconds, loss = [], float("nan")
    for _ in range(steps):
        start = time.perf_counter()
        loss = float(train_step(engine, batches).loss)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds_per_step": statistics.median(seconds),
        "loss": loss,
        "rss_peak_bytes": measure_peak(torch.device("cpu")).peak_bytes,
        "peak_bytes": measure_peak(device).peak_bytes,
        "data_bytes": measure_data(),
    }


def wait_for_threads(work: dist.Work, *arguments: Any, original: Any = dist.Work.wait, **options: Any) -> bool:
    """Wait, and let gloo's thread let go first: what it frees, this thread's count would never see."""
    done: bool = original(work, *arguments, **options)
    time.sleep(0.05)  # a busy machine takes a while to come to it
    return done


def main() -> None:
    """Measure the trial of the command line; ranks come from the environment, as launchers set it.

    With a second word, a number of steps, it only runs them, for a process under a limit; on CUDA if a third says so.
    With `parts` for that word it measures the tower's part of one step apart.
    """
    trial = Trial.from_json(sys.argv[1])
    device = assemble.choose_device(sys.argv[3] if len(sys.argv) > 3 else "cpu")
    dist.Work.wait = wait_for_threads  # type: ignore[method-assign,assignment]
    start_process_group(device, trial.world, deepspeed=trial.ds is not None, fsdp=trial.fsdp)
    before = measure_data()
    found: dict[str, Any]
    if len(sys.argv) < 3:
        found = dict(zip(("peak_bytes", "peak_operator"), locate_peak(trial), strict=True))
    elif sys.argv[2] == "parts":
        found = measure_parts(trial)
    else:
        found = run_trial(trial, int(sys.argv[2]), device)
    print(json.dumps({**found, "data_bytes_before": before}), flush=True)
    os._exit(0)  # taking a process group down can wait for ranks that are gone


if __name__ == "__main__":
    main()
