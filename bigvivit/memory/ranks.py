"""The processes of one run: which one this is, and the group they talk in. Imports no torch until it is needed."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, as every launcher says them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start_process_group(device: torch.device, world: int, *, deepspeed: bool, fsdp: bool) -> None:
    """torch.distributed for several ranks, and for DeepSpeed and FSDP2, which want it for one too."""
    import torch.distributed as dist

    if world == 1 and not (deepspeed or fsdp):
        return
    if world == 1:  # started without a launcher
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update({name: os.environ.get(name, value) for name, value in alone.items()})
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if deepspeed:
        os.environ["DS_ACCELERATOR"] = device.type  # else DeepSpeed guesses, and may guess another than --device says
        from bigvivit.memory.zero import init_deepspeed

        init_deepspeed(device)
