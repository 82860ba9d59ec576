"""The frozen tower's vectors by a model's own forward: what a cache keeps is what training without one would see."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class TowerPass:
    """Runs clips through a whole model and catches the vectors where they leave its tower.

    Through the whole of it, since ZeRO-3 and FSDP2 gather weights from the root's forward on; what follows the tower
    is small, and its result is dropped.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, sharded: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """`sharded` is the engine of a module that ranks share, and must run together."""
        self.module, self.device, self.sharded = module, device, sharded

    def most(self, value: int) -> int:
        """The largest of all ranks' values where they must run the tower together; else the value itself."""
        if self.sharded is None or not dist.is_initialized():
            return value
        most = torch.tensor(int(value), device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def __call__(self, clips: Tensor) -> Tensor:
        """Vectors [m, tubelets, width] on the CPU of clips uint8 [m, frames, 3, height, width]."""
        caught: list[Tensor] = []
        training = self.module.training
        hook = self.module.tower.register_forward_hook(lambda *passed: caught.append(passed[2]))  # type: ignore[union-attr]
        self.module.eval()
        try:
            with torch.no_grad():
                (self.sharded or self.module)(clips)
        finally:
            hook.remove()
            self.module.train(training)
        (vectors,) = caught
        return vectors.view(len(clips), -1, vectors.shape[-1]).cpu()
