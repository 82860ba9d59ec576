"""One training step without videos, as a configuration describes it: what benches measure and forecasts trace.

`python -m bigvivit.trial '{"stage": 2, "tower": "vit-b", "frames": 8}'` measures one rank of it on the CPU.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist

from bigvivit import assemble
from bigvivit.config import ClipConfig, ConfigError, ModelConfig, OptimConfig, check_frames, check_memory
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.corrections import Name
from bigvivit.forecast.fake import fake_ranks
from bigvivit.forecast.sharding import TowerSize, size_tower
from bigvivit.forecast.trace import STEPS, Trace, repeat_batch, trace_steps
from bigvivit.memory.apply import apply_plan
from bigvivit.memory.ds_json import zero_stage
from bigvivit.memory.engine import Engine
from bigvivit.memory.measure import count_cpu_allocations, measure_data, measure_peak
from bigvivit.memory.parallel import build_engine, build_sharder
from bigvivit.memory.plan import MemoryPlan
from bigvivit.memory.quantize import eight_bit_on_fake_tensors, is_quantized, value_dtype
from bigvivit.memory.ranks import start_process_group
from bigvivit.memory.stream import FrozenTower
from bigvivit.model.towers import build_tower, resolve_tower
from bigvivit.model.tubelet import to_tubelets
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
    accumulate: int = 1
    """Micro-batches per optimizer step."""
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
    batch_size = trial.clips * trial.world * trial.accumulate
    optim = OptimConfig(
        name=trial.optimizer, batch_size=batch_size, accumulate=trial.accumulate, epochs=1, warmup_epochs=0
    )
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
    trial: Trial,
    *,
    free_bytes: int,
    host: bool = False,
    card: Accelerator | None = None,
    without: Collection[Name] = (),
    steps: int = STEPS,
    repeat: bool = True,
) -> Trace:
    """The trial's steps on fake tensors, on the fullest of as many fake ranks as it asks for.

    `host`: the device's memory is another than the host's; `card` makes the corrections of `forecast/corrections.py`
    but for those in `without`. For a process without a process group; after a trace of ZeRO, for one that does nothing
    else.
    """
    import_early(trial)

    def build() -> tuple[Engine, LabelledClips]:
        return build_trial(trial, torch.device("cpu"), fake=True, free_bytes=free_bytes)

    with ExitStack() as stack:
        sharded = trial.ds is not None or trial.fsdp
        stack.enter_context(fake_ranks(trial.world, fullest_rank(trial), always=sharded))
        stack.enter_context(fake_engine(trial))
        if trial.optimizer.endswith("8bit"):
            stack.enter_context(eight_bit_on_fake_tensors(in_place=host))
        return trace_steps(
            build, host=host, card=card, without=without, steps=steps, accumulate=trial.accumulate, repeat=repeat
        )


def fullest_rank(trial: Trial) -> int:
    """The rank whose peak is the highest. ZeRO-2 keeps a rank's part of the gradients from when it is reduced: the last
    rank's comes first in the backward, when the activations are still there. Else rank 0's part is never the smaller.
    """
    return trial.world - 1 if zero_stage(trial.ds) == 2 else 0


def import_early(trial: Trial) -> None:
    """What would keep tensors that are counted, if it were imported later."""
    if is_quantized(trial.plan.storage):
        import bitsandbytes.functional  # noqa: F401


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


def size_trial(trial: Trial) -> TowerSize:
    """What sharding the trial's tower depends on, of the tower built without weights."""
    model = ModelConfig(tower=trial.tower, tower_init="random", tubelet=trial.tubelet)
    spec = open_source(trial, model, fake=True).spec
    tower = build_tower(spec, tubelet=trial.tubelet, image_size=trial.size, droplayer=0.0)
    pixels = torch.empty(1, 3 * trial.tubelet, trial.size, trial.size, dtype=torch.uint8, device="meta")
    units = [tower.embed, *tower.layers, tower.pool]
    return size_tower(tower, units, pixels, value_dtype(trial.plan.storage).itemsize)


def fill_nothing(name: str, piece: torch.nn.Module) -> None:
    """For fake tensors."""


def shorten(config: Any, layers: int) -> Any:
    """A copy of a tower's configuration with fewer layers."""
    values = {**config.to_dict(), "num_hidden_layers": layers}
    for name in ("out_features", "out_indices", "stage_names"):  # of backbones, which count the layers too
        values.pop(name, None)
    return type(config).from_dict(values)


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
    time.sleep(0.03)  # a busy machine takes a while to come to it
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
