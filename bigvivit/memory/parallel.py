"""Which sharder and which engine a run asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from bigvivit.config import OptimConfig
from bigvivit.memory.ds_json import zero_stage
from bigvivit.memory.engine import DdpEngine, Engine, PlainEngine
from bigvivit.memory.load import Sharder


def build_sharder(ds: dict[str, Any] | None, *, fsdp: bool, device: torch.device) -> Sharder | None:
    """What shards the model's pieces as they are loaded; None where each rank keeps all of them."""
    if zero_stage(ds) == 3:
        from bigvivit.memory.zero import ZeroSharder

        assert ds is not None
        return ZeroSharder(ds)
    if fsdp:
        from bigvivit.memory.fsdp import FsdpSharder

        return FsdpSharder(device)
    return None


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    optim: OptimConfig,
    *,
    ds: dict[str, Any] | None,
    fsdp: bool,
    world: int,
    device: torch.device,
) -> Engine:
    """The engine for a model that `apply_plan` has prepared with the sharder of the same options."""
    if ds is not None:
        from bigvivit.memory.zero import ZeroEngine

        return ZeroEngine(model, optimizer, scheduler, ds=ds)
    kind: type[PlainEngine] = DdpEngine if world > 1 else PlainEngine
    if fsdp:
        from bigvivit.memory.fsdp import FsdpEngine

        kind = FsdpEngine
    return kind(
        model,
        optimizer,
        scheduler,
        device=device,
        accumulate=optim.accumulate,
        clip_norm=optim.clip_norm,
        ema=optim.ema,
    )
