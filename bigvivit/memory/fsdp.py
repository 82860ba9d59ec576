"""PyTorch's FSDP2 behind the Engine protocol. The only module that imports torch's FSDP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fully_shard
from torch.distributed.tensor import DTensor

from bigvivit.memory.engine import PlainEngine


class FsdpSharder:
    """Shards units as they are filled, then what is trained, in units of its own.

    Frozen and trained parameters never share a unit: one that mixed them would hold gradients for both.
    """

    forgets_shapes = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def shard(self, unit: nn.Module) -> None:
        """Keep this rank's part; gathered whole while the unit runs and let go after it."""
        fully_shard(unit, reshard_after_forward=True)

    def finish(self, model: nn.Module) -> None:
        """Shard all that is left: repeated layers one by one, the rest with the root."""
        model.to(self.device)
        for part in model.modules():
            if isinstance(part, nn.ModuleList):
                for layer in part:
                    if not isinstance(layer, FSDPModule):
                        fully_shard(layer, reshard_after_forward=True)
        # The root's own few parameters come last in the forward and first in the backward.
        fully_shard(model, reshard_after_forward=False)


class FsdpEngine(PlainEngine):
    """Training of a model that FsdpSharder has sharded."""

    name = "fsdp2"

    def __call__(self, clips: Tensor) -> Tensor:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(self.completes_a_step())
        logits = self.module(clips)
        if not torch.is_grad_enabled():
            self.module.reshard()  # the root's own parameters, which otherwise wait, whole, for a backward
        return logits

    def gather(self, module: nn.Module) -> dict[str, Tensor]:
        whole = {}
        for name, parameter in module.named_parameters():
            tensor = parameter.detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if dist.get_rank() == 0:
                whole[name] = tensor.cpu()
        return whole


@contextmanager
def fsdp_on_fake_tensors() -> Iterator[None]:
    """Make `fully_shard` work inside a FakeTensorMode that is entered later, on a fake process group."""
    # Made now, since which rank a mesh puts us on is looked up by value, and fake tensors have none.
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with (
        patch.object(_fully_shard, "_init_default_mesh", lambda *_, **__: mesh),
        patch.object(_fsdp_param, "_chunk_with_empty", first_chunk),
    ):
        yield


def first_chunk(tensor: Tensor, chunks: int, dim: int) -> list[Tensor | None]:
    """Rank 0's chunk of all of them: FSDP2 cuts a weight into one for each rank, and a fake tensor takes its time."""
    size = -(-tensor.size(dim) // chunks)
    return [tensor.narrow(dim, 0, size), *[None] * (chunks - 1)]
