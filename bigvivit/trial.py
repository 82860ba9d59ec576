"""One training step without videos, as a configuration describes it: built, for benches, and traced, for forecasts.

`bigvivit/trial_run.py` runs it for real.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch

from bigvivit import assemble
from bigvivit.config import (
    ClipConfig,
    ConfigError,
    ModelConfig,
    OptimConfig,
    ProbeHead,
    check_frames,
    check_memory,
)
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.corrections import Name
from bigvivit.forecast.fake import fake_ranks
from bigvivit.forecast.sharding import TowerSize, size_tower
from bigvivit.forecast.trace import STEPS, Trace, trace_steps
from bigvivit.memory.apply import apply_plan, compute_dtype
from bigvivit.memory.ds_json import zero_stage
from bigvivit.memory.engine import Engine
from bigvivit.memory.load import Fill
from bigvivit.memory.parallel import build_engine, build_sharder
from bigvivit.memory.plan import MemoryPlan
from bigvivit.memory.quantize import eight_bit_on_fake_tensors, is_quantized, value_dtype
from bigvivit.model.bank import ProbeBank
from bigvivit.model.towers import build_tower, resolve_tower
from bigvivit.model.vivit import ViViT
from bigvivit.training.bank import build_bank_optimizer
from bigvivit.training.optim import build_optimizer, build_scheduler
from bigvivit.training.step import LabelledClips

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
    temporal_input: Literal["centred", "original"] = "centred"
    patch_grid: int = 0
    droplayer: float = 0.0
    clips: int = 1
    """Clips of a rank's micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    classes: int = CLASSES
    layers: int | None = None
    """Use so many of the tower's layers only."""
    depths: tuple[int, ...] = ()
    """Of a probe bank's heads, the layers of their temporal transformers; none for a run of one."""
    cached: bool = False
    """The micro-batch is vectors that a cache holds: the tower is there, and does not run."""
    optimizer: Literal["sgd", "adamw", "sgd8bit", "adamw8bit"] = "sgd"
    fused: bool = False
    """Whether the optimizer updates all weights in one kernel."""
    ema: float = 0.0
    """Decay of the moving average of the trained weights; 0 keeps none."""
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
        parts = {"plan": MemoryPlan(**values.get("plan", {})), "depths": tuple(values.get("depths", ()))}
        return cls(**{**values, **parts})


def build_trial(
    trial: Trial,
    device: torch.device,
    *,
    fake: bool = False,
    free_bytes: int | None = None,
    fill: Fill | None = None,
) -> tuple[Engine, LabelledClips]:
    """The engine and one micro-batch of random clips. On fake tensors weights have no values, so none are drawn.

    `free_bytes` is what groups and chunks of `auto` are chosen for: by default what is free on this machine. `fill`
    gives the tower other weights than those drawn as training would.

    With several ranks the process group must be there. Raises ConfigError for what cannot be.
    """
    model_config = ModelConfig(
        tower=trial.tower,
        tower_init="random",
        tubelet=trial.tubelet,
        temporal_depth=trial.temporal_depth,
        temporal_input=trial.temporal_input,
        patch_grid=trial.patch_grid,
        droplayer=trial.droplayer,
    )
    clip = ClipConfig(frames=trial.frames, size=trial.size, resize=trial.size)
    batch_size = trial.clips * trial.world * trial.accumulate
    optim = OptimConfig(
        name=trial.optimizer,
        batch_size=batch_size,
        accumulate=trial.accumulate,
        epochs=1,
        warmup_epochs=0,
        fused=trial.fused,
        ema=trial.ema,
    )
    source = open_source(trial, model_config, fake=fake)
    if fill is not None:
        source = replace(source, fill=fill)
    model: ViViT | ProbeBank
    if trial.depths:
        model = assemble.build_probes(source, model_config, clip, classes=trial.classes, seed=0, depths=trial.depths)
    else:
        model = assemble.build_model(
            source, model_config, clip, classes=trial.classes, adapter=trial.stage == 2, seed=0
        )
    sharder = build_sharder(trial.ds, fsdp=trial.fsdp, device=device)
    frozen = trial.stage == 2
    apply_plan(
        model, trial.plan, frozen=frozen, fill=source.fill, device=device, sharder=sharder, free_bytes=free_bytes
    )
    model.train()
    heads = [ProbeHead(optim.lr, optim.weight_decay, depth) for depth in trial.depths]
    optimizer = build_bank_optimizer(model, heads, optim) if heads else build_optimizer(model, optim)
    scheduler = build_scheduler(optimizer, optim, SCHEDULE)
    engine = build_engine(
        model, optimizer, scheduler, optim, ds=trial.ds, fsdp=trial.fsdp, world=trial.world, device=device
    )
    clips = make_clips(trial, source.spec.width, compute_dtype(trial.plan, device), fake=fake)
    batch = SimpleNamespace(clips=clips, labels=torch.zeros(trial.clips, dtype=torch.int64), indices=None)
    return engine, batch


def make_clips(trial: Trial, width: int, compute: torch.dtype, *, fake: bool) -> torch.Tensor:
    """A micro-batch of random clips, or of the vectors a cache would hold in their place."""
    if trial.cached:
        shape = (trial.clips, trial.frames // trial.tubelet, width * (1 + trial.patch_grid**2))
        return (torch.empty if fake else torch.randn)(shape, dtype=compute)
    pixels = (trial.clips, trial.frames, 3, trial.size, trial.size)
    return torch.empty(pixels, dtype=torch.uint8) if fake else torch.randint(256, pixels, dtype=torch.uint8)


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
    """The trial's steps on fake tensors, on the fullest of the ranks that may be it (`fullest_ranks`).

    `host`: the device's memory is another than the host's; `card` makes the corrections of `forecast/corrections.py`
    but for those in `without`. For a process without a process group; after a trace of ZeRO, for one that does nothing
    else.
    """
    import_early(trial)

    def build() -> tuple[Engine, LabelledClips]:
        return build_trial(trial, torch.device("cpu"), fake=True, free_bytes=free_bytes)

    traces = []
    for rank in fullest_ranks(trial):
        with ExitStack() as stack:
            sharded = trial.ds is not None or trial.fsdp
            stack.enter_context(fake_ranks(trial.world, rank, always=sharded))
            stack.enter_context(fake_engine(trial))
            if trial.optimizer.endswith("8bit"):
                stack.enter_context(eight_bit_on_fake_tensors(in_place=host))
            traces.append(
                trace_steps(
                    build,
                    host=host,
                    card=card,
                    without=without,
                    steps=steps,
                    accumulate=trial.accumulate,
                    repeat=repeat,
                )
            )
    return max(traces, key=Trace.peak_bytes)


def fullest_ranks(trial: Trial) -> list[int]:
    """Ranks whose peak may be highest. ZeRO-2 keeps a rank's part of the gradients from when it is reduced: the last
    rank's comes first in the backward, when the activations are still there. Under ZeRO-1 it depends on where the
    border of the parts lies: the first and the last are both traced. Else rank 0's part is never the smaller.
    """
    stage, last = zero_stage(trial.ds), trial.world - 1
    return [last] if stage == 2 else sorted({0, last}) if stage == 1 else [0]


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
