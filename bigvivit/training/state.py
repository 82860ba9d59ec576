"""The small states that training goes on with: random numbers and the learning rate."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler


def gather_random(rank: int, world: int) -> dict[str, Tensor]:
    """The random states of all ranks, on rank 0. Every rank must call it."""
    own = {f"cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # asking a GPU that the run does not use would open it
        own[f"cuda.{rank}"] = torch.cuda.get_rng_state()
    if world == 1:
        return own
    everyone: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(own, everyone)
    return {key: state for states in everyone or [] for key, state in states.items()}


def restore_random(states: dict[str, Tensor], *, seed: int, rank: int, world: int) -> None:
    """This rank's random states; with another number of ranks or another device, new ones from the seed."""
    kept = sum(key.startswith("cpu.") for key in states)
    wanted = {f"cpu.{rank}"} | ({f"cuda.{rank}"} if torch.cuda.is_initialized() else set())
    if kept != world or not wanted <= states.keys():
        torch.manual_seed(seed + rank)
        return
    torch.set_rng_state(states[f"cpu.{rank}"])
    if torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states[f"cuda.{rank}"])


def scheduler_state(scheduler: LRScheduler) -> dict[str, Any]:
    """What JSON can hold of a scheduler: all but its functions, which the settings give again."""
    return {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}


def restore_scheduler(scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Go on from `scheduler_state`, also in the optimizer's groups."""
    scheduler.load_state_dict({**scheduler.state_dict(), **state})
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
