"""What the training loop needs of an engine, and the two that keep the model whole."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from bigvivit.memory.averages import AVERAGE, Averages, begin_averages


class Engine(Protocol):
    """Forward, backward and step of one model on one rank. Gradients are averaged over ranks and micro-batches."""

    name: str
    """For logs and reports: `plain`, `ddp`, `zero3` …"""
    module: nn.Module
    scheduler: LRScheduler
    device: torch.device

    def __call__(self, clips: Tensor) -> Tensor:
        """Logits [b, classes], of a probe bank [heads, b, classes], of clips [b, frames, 3, height, width] or of a
        frozen tower's vectors [b, tubelets, width]."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch's mean loss, to be called once after each forward."""
        ...

    def step(self) -> float | None:
        """Update once `accumulate` micro-batches are in.

        The norm of the whole gradient before clipping, or None between updates.
        """
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """The model with the moving averages of its weights, where it keeps some: to validate, and to keep, it so."""
        ...

    def gather(self, module: nn.Module) -> dict[str, Tensor]:
        """Whole parameters of a part of the model, on the CPU of rank 0; nothing elsewhere. Every rank must call it."""
        ...

    def gather_optimizer(self) -> dict[str, Tensor]:
        """The optimizer's whole state as `<parameter>.<key>`, on the CPU of rank 0. Every rank must call it."""
        ...

    def load_optimizer(self, state: dict[str, Tensor]) -> None:
        """Take over a state that `gather_optimizer` gave, on this or on another engine. Every rank must call it."""
        ...


def gather_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """See Engine.gather_optimizer; for parameters that are whole or DTensors."""
    if is_eight_bit(optimizer):
        return read_blocks(optimizer, dict(module.named_parameters()))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=options)
    return {f"{name}.{key}": value for name, own in whole.get("state", {}).items() for key, value in own.items()}


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """See Engine.load_optimizer; for parameters that are whole or DTensors."""
    if is_eight_bit(optimizer):
        return load_blocks(optimizer, dict(module.named_parameters()), state)
    options = StateDictOptions(full_state_dict=True)
    whole: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=options)
    if any(entry.endswith(f".{AVERAGE}") for entry in state):
        begin_averages(optimizer)  # only what is there already is sharded as its weight is
    for entry, value in state.items():
        name, _, key = entry.rpartition(".")
        whole["state"].setdefault(name, {})[key] = value
    set_optimizer_state_dict(module, optimizer, whole, options=options)


def is_eight_bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of bitsandbytes', whose state is codes, not values: what asks for values must not touch it."""
    return type(optimizer).__module__.startswith("bitsandbytes.")


def read_blocks(optimizer: torch.optim.Optimizer, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The codes, block maxima and step counts as they are, on the CPU."""
    return {
        f"{name}.{key}": torch.as_tensor(value).detach().cpu().clone()
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_blocks(optimizer: torch.optim.Optimizer, named: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Take over what `read_blocks` gave under the same names."""
    for entry, value in state.items():
        name, _, key = entry.rpartition(".")
        if name in named:
            parameter = named[name]
            optimizer.state[parameter][key] = int(value) if key == "step" else value.to(parameter.device)


class PlainEngine:
    """PyTorch as it is, in one process."""

    name = "plain"

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        *,
        device: torch.device,
        accumulate: int,
        clip_norm: float,
        ema: float = 0.0,
    ) -> None:
        self.module, self.optimizer, self.scheduler = module, optimizer, scheduler
        self.device, self.accumulate = device, accumulate
        self.clip_norm = clip_norm or float("inf")
        self.averages = Averages(optimizer, ema) if ema else None
        self.micro_batches = 0

    def __call__(self, clips: Tensor) -> Tensor:
        return self.module(clips)

    def completes_a_step(self) -> bool:
        """Whether the next micro-batch is the last before an update."""
        return (self.micro_batches + 1) % self.accumulate == 0

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulate).backward()
        self.micro_batches += 1

    def step(self) -> float | None:
        if self.micro_batches % self.accumulate:
            return None
        trained: dict[int, list[Tensor]] = {}  # by the head of a probe bank: each is clipped by its own norm
        for group in self.optimizer.param_groups:
            trained.setdefault(group.get("head", 0), []).extend(group["params"])
        norms = [float(nn.utils.clip_grad_norm_(parameters, self.clip_norm)) for parameters in trained.values()]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.averages is not None:
            self.averages.update(self.scheduler.last_epoch)
        return max(filter(math.isfinite, norms), default=norms[0])

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.averages is None else self.averages.swapped()

    def gather(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: p.detach().cpu() for name, p in module.named_parameters()}

    def gather_optimizer(self) -> dict[str, Tensor]:
        return gather_optimizer_state(self.module, self.optimizer)

    def load_optimizer(self, state: dict[str, Tensor]) -> None:
        load_optimizer_state(self.module, self.optimizer, state)
        if self.averages is not None:
            self.averages.exchange()  # a checkpoint's model holds the averages


class DdpEngine(PlainEngine):
    """DistributedDataParallel: the whole model on every rank."""

    name = "ddp"

    def __init__(self, module: nn.Module, *parts: Any, device: torch.device, **options: Any) -> None:
        super().__init__(module, *parts, device=device, **options)
        # Without device_ids, for which DDP would copy whole clips to the device: the tower takes them chunk by chunk.
        self.ddp = DistributedDataParallel(module)

    def __call__(self, clips: Tensor) -> Tensor:
        # DDP decides in its forward whether the backward that follows reduces gradients.
        with nullcontext() if self.completes_a_step() else self.ddp.no_sync():
            return self.ddp(clips)

    def gather(self, module: nn.Module) -> dict[str, Tensor]:
        return super().gather(module) if dist.get_rank() == 0 else {}

    def gather_optimizer(self) -> dict[str, Tensor]:
        return super().gather_optimizer() if dist.get_rank() == 0 else {}
