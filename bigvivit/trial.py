"""One training step without videos, as a configuration describes it: what benches measure and forecasts trace.

`python -m bigvivit.trial '{"stage": 2, "tower": "vit-b", "frames": 8}'` measures one rank of it on the CPU.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist

from bigvivit import assemble
from bigvivit.config import ClipConfig, ConfigError, ModelConfig, OptimConfig, check_frames, check_memory
from bigvivit.forecast.fake import fake_ranks
from bigvivit.forecast.trace import STEPS, Trace, trace_steps
from bigvivit.memory.apply import apply_plan
from bigvivit.memory.engine import Engine
from bigvivit.memory.measure import count_cpu_allocations, measure_data, measure_peak
from bigvivit.memory.parallel import build_engine, build_sharder
from bigvivit.memory.plan import MemoryPlan
from bigvivit.memory.quantize import is_quantized
from bigvivit.memory.ranks import start_process_group
from bigvivit.model.towers import resolve_tower
from bigvivit.training.optim import build_optimizer, build_scheduler
from bigvivit.training.step import LabelledClips, train_step

CLASSES, SCHEDULE = 400, 10
"""Of Kinetics; and steps of a learning-rate schedule that nobody finishes."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What decides how much memory a step takes on one rank."""

    stage: Literal[1, 2]
    tower: str
    frames: int
    size: int = 224
    tubelet: int = 2
    temporal_depth: int = 4
    droplayer: float = 0.0
    clips: int = 1
    """Clips of a rank's micro-batch."""
    classes: int = CLASSES
    layers: int | None = None
    """Use so many of the tower's layers only."""
    optimizer: Literal["sgd", "adamw", "sgd8bit", "adamw8bit"] = "sgd"
    plan: MemoryPlan = field(default_factory=MemoryPlan)
    fsdp: bool = False
    ds: dict[str, Any] | None = None
    """A DeepSpeed configuration as read_ds_json gives it."""
    world: int = 1

    def __post_init__(self) -> None:
        check_frames(self.frames, self.tubelet)
        check_memory(self.plan, self.stage)

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Trial:
        """What `to_json` wrote; fields may be left out."""
        values = json.loads(text)
        return cls(**{**values, "plan": MemoryPlan(**values.get("plan", {}))})


def build_trial(
    trial: Trial, device: torch.device, *, fake: bool = False, free_bytes: int | None = None
) -> tuple[Engine, LabelledClips]:
    """The engine and one micro-batch of random clips. On fake tensors weights have no values, so none are drawn.

    `free_bytes` is what groups and chunks of `auto` are chosen for: by default what is free on this machine.

    With several ranks the process group must be there. Raises ConfigError for what cannot be.
    """
    model_config = ModelConfig(
        tower=trial.tower,
        tower_init="random",
        tubelet=trial.tubelet,
        temporal_depth=trial.temporal_depth,
        droplayer=trial.droplayer,
    )
    clip = ClipConfig(frames=trial.frames, size=trial.size, resize=trial.size)
    optim = OptimConfig(name=trial.optimizer, batch_size=trial.clips * trial.world, epochs=1, warmup_epochs=0)
    source = open_source(trial, model_config, fake=fake)
    model = assemble.build_model(source, model_config, clip, classes=trial.classes, adapter=trial.stage == 2, seed=0)
    sharder = build_sharder(trial.ds, fsdp=trial.fsdp, device=device)
    frozen = trial.stage == 2
    apply_plan(
        model, trial.plan, frozen=frozen, fill=source.fill, device=device, sharder=sharder, free_bytes=free_bytes
    )
    model.train()
    optimizer = build_optimizer(model, optim)
    scheduler = build_scheduler(optimizer, optim, SCHEDULE)
    engine = build_engine(
        model, optimizer, scheduler, optim, ds=trial.ds, fsdp=trial.fsdp, world=trial.world, device=device
    )
    shape = (trial.clips, trial.frames, 3, trial.size, trial.size)
    clips = torch.empty(shape, dtype=torch.uint8) if fake else torch.randint(256, shape, dtype=torch.uint8)
    batch = SimpleNamespace(clips=clips, labels=torch.zeros(trial.clips, dtype=torch.int64), indices=None)
    return engine, batch


def trace_trial(
    trial: Trial, *, free_bytes: int, host: bool = False, foreach: bool = False, steps: int = STEPS
) -> Trace:
    """The trial's steps on fake tensors, on rank 0 of as many fake ranks as it asks for.

    `host`: the device's memory is another than the host's; `foreach`: optimizers update all parameters at once, as
    they do on CUDA. For a process without a process group; after a trace of ZeRO, for one that does nothing else.
    """

    if is_quantized(trial.plan.storage):
        import bitsandbytes.functional  # noqa: F401 - whose import would keep tensors of ours if it came later

    def build() -> tuple[Engine, LabelledClips]:
        engine, batch = build_trial(trial, torch.device("cpu"), fake=True, free_bytes=free_bytes)
        optimizer: torch.optim.Optimizer = engine.optimizer  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = foreach
        return engine, batch

    with fake_ranks(trial.world, always=trial.ds is not None or trial.fsdp), fake_engine(trial):
        return trace_steps(build, host=host, steps=steps)


@contextmanager
def fake_engine(trial: Trial) -> Iterator[None]:
    """What the trial's engine needs to run on fake tensors."""
    if trial.ds is not None:
        from bigvivit.memory.zero import zero_on_fake_tensors

        with zero_on_fake_tensors():
            yield
    elif trial.fsdp:
        from bigvivit.memory.fsdp import fsdp_on_fake_tensors

        with fsdp_on_fake_tensors():
            yield
    else:
        yield


def open_source(trial: Trial, model: ModelConfig, *, fake: bool) -> assemble.TowerSource:
    """The tower with random weights, or with none."""
    if not fake:
        source = assemble.open_tower(model, seed=0)
    else:
        try:
            source = assemble.TowerSource(resolve_tower(trial.tower, random=True), fill_nothing, None, None)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if trial.layers is not None:
        source = replace(source, spec=replace(source.spec, config=shorten(source.spec.config, trial.layers)))
    return source


def fill_nothing(name: str, piece: torch.nn.Module) -> None:
    """For fake tensors."""


def shorten(config: Any, layers: int) -> Any:
    """A copy of a tower's configuration with fewer layers."""
    return type(config).from_dict({**config.to_dict(), "num_hidden_layers": layers})


def measure_trial(trial: Trial, steps: int = STEPS) -> int:
    """Peak bytes of PyTorch's CPU allocator over real steps, by its own count. The process group must be there."""
    device = torch.device("cpu")
    with count_cpu_allocations() as building:
        engine, batch = build_trial(trial, device)
    with count_cpu_allocations() as training:
        for _ in range(steps):
            train_step(engine, [batch])
    return building.left_bytes + training.peak_bytes


def run_trial(trial: Trial, steps: int, device: torch.device) -> dict[str, float]:
    """Real steps without the allocator's count, which itself takes memory: what the process came to."""
    engine, batch = build_trial(trial, device)
    seconds, loss = [], float("nan")
    for _ in range(steps):
        start = time.perf_counter()
        loss = float(train_step(engine, [batch]).loss)
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
    time.sleep(0.003)
    return done


def main() -> None:
    """Measure the trial of the command line; ranks come from the environment, as launchers set it.

    With a second word, a number of steps, it only runs them, for a process under a limit; on CUDA if a third says so.
    """
    trial = Trial.from_json(sys.argv[1])
    device = assemble.choose_device(sys.argv[3] if len(sys.argv) > 3 else "cpu")
    dist.Work.wait = wait_for_threads  # type: ignore[method-assign,assignment]
    start_process_group(device, trial.world, deepspeed=trial.ds is not None, fsdp=trial.fsdp)
    before = measure_data()
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    found = run_trial(trial, steps, device) if steps else {"peak_bytes": measure_trial(trial)}
    print(json.dumps({**found, "data_bytes_before": before}), flush=True)
    os._exit(0)  # taking a process group down can wait for ranks that are gone


if __name__ == "__main__":
    main()
