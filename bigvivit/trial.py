"""One training step without videos, as a configuration describes it: what benches measure and forecasts trace."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch

from bigvivit import assemble
from bigvivit.config import ClipConfig, ConfigError, ModelConfig, OptimConfig, check_frames, check_memory
from bigvivit.memory.apply import apply_plan
from bigvivit.memory.engine import Engine
from bigvivit.memory.parallel import build_engine, build_sharder
from bigvivit.memory.plan import MemoryPlan
from bigvivit.model.towers import resolve_tower
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

    def with_frames(self, frames: int) -> Trial:
        """The same with another number of frames."""
        return replace(self, frames=frames)


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
