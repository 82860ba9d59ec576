"""What a trained part keeps for its backward: recomputed there, or kept in the host's memory meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigvivit.memory.offload import Copies, keep_on_host


def trained_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers that have something to train."""
    for part in model.modules():
        if isinstance(part, nn.ModuleList):
            yield from (layer for layer in part if any(p.requires_grad for p in layer.parameters()))


def apply_recompute(model: nn.Module, every: int, *, reentrant: bool) -> None:
    """Every n-th trained block keeps only its input, and computes the rest once more in the backward.

    `reentrant` is for ZeRO-3: PyTorch's other way compares what it recomputes with the weights' shapes in the forward,
    which ZeRO-3 has taken away by then. Random states are restored, so stochastic depth drops the same branches.
    """
    for number, block in enumerate(trained_blocks(model)):
        if number % every == 0:
            block.forward = partial(recomputed, block.forward, reentrant=reentrant)


def recomputed(forward: Callable[..., Tensor], hidden: Tensor, *, reentrant: bool, **extras: Any) -> Tensor:
    """`forward(hidden, **extras)` under torch.utils.checkpoint, which passes no keywords on when it is re-entrant."""
    output: Tensor = checkpoint(partial(forward, **extras), hidden, use_reentrant=reentrant)
    return output


def apply_offload(model: nn.Module, device: torch.device) -> None:
    """What the model's forward saves for its backward waits in the host's memory, page-locked where that is CUDA's.

    Weights stay where they are: torch.autograd.graph.save_on_cpu would copy them too.
    """
    forward, copies = model.forward, Copies(device)

    def offloaded(*inputs: Any, **options: Any) -> Any:
        with keep_on_host(copies):
            return forward(*inputs, **options)

    model.forward = offloaded
