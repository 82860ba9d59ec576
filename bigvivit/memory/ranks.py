"""The processes of one run: which one this is, and what they can tell each other. Imports no torch until needed."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, TypeVar

from bigvivit.config import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store


T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, as every launcher says them."""
    values = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
        value = os.environ.get(name, default)
        if not value.isdecimal():
            raise ConfigError(f"environment variable {name}={value!r} is not a number: launchers set it, or unset it")
        values[name] = int(value)
    rank, world = values["RANK"], values["WORLD_SIZE"]
    if rank >= world:
        raise ConfigError(
            f"environment variable RANK={rank} is not below WORLD_SIZE={world}: unset both, or use torchrun"
        )
    return rank, world


def is_first_of_node() -> bool:
    """Whether this process speaks for its node, where all processes of a node would say the same."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


OTHERS_WAIT_S = 20.0
"""Launchers end all ranks as soon as one has ended: the one that speaks must be the first, on a busy machine too."""


def tell_once(message: str) -> None:
    """Print an error that every process of a node has met: the first at once, and its launcher then ends the others.

    They speak for themselves where that does not happen, since then the fault may be theirs alone.
    """
    if not is_first_of_node():
        time.sleep(OTHERS_WAIT_S)
    print(message, file=sys.stderr, flush=True)


def gather_over_ranks(own: T) -> list[T]:
    """What each rank has, in their order, on every rank; `own` alone in one process. Every rank must call it."""
    import torch.distributed as dist

    everyone = [own]
    if dist.is_initialized():
        everyone *= dist.get_world_size()
        dist.all_gather_object(everyone, own)
    return everyone


class Board:
    """Notes that every rank can read at any time: no collective, so nobody has to be waited for."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def post(self, key: str, text: str) -> str:
        """Pin a note unless one is there. Returns the one that is there now, whoever wrote it."""
        return self.store.compare_set(key, "", text).decode()

    def read(self, key: str, wait_s: float = 0.0) -> str | None:
        """The note, or None where there is none; waits for one up to `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        while not self.store.check([key]):
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)
        return self.store.get(key).decode()


def start_process_group(device: torch.device, world: int, *, deepspeed: bool, fsdp: bool) -> Board:
    """torch.distributed for several ranks, and for DeepSpeed and FSDP2, which want it for one too."""
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    if world == 1:
        store: Store = dist.HashStore()
        if deepspeed or fsdp:
            # DeepSpeed reads these again, and asks MPI where they are missing.
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            os.environ.update({name: os.environ.get(name, value) for name, value in alone.items()})
            dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=0, world_size=1)
    else:
        store, rank, _ = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world)
    if deepspeed:
        os.environ["DS_ACCELERATOR"] = device.type  # else DeepSpeed guesses, and may guess another than --device says
        from bigvivit.memory.zero import init_deepspeed

        init_deepspeed(device)
    return Board(dist.PrefixStore("board", store))
