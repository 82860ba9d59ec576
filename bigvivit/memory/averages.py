"""Exponential moving averages of trained weights, in the optimizer's state: sharded, kept and resumed as that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

AVERAGE = "ema"
"""Key in a parameter's state. Inside `Averages.swapped` the weight itself is there, and the average in its place."""


class Averages:
    """The averages of all that an optimizer has stepped. (PyTorch's AveragedModel would copy the frozen tower too.)"""

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.optimizer, self.decay = optimizer, decay

    def update(self, steps: int) -> None:
        """Take in the weights after so many steps; at first over a window that grows with them, as in timm."""
        begin_averages(self.optimizer)
        pairs = list(self.pairs())
        with torch.no_grad():
            average = get_ema_multi_avg_fn(min(self.decay, (1 + steps) / (10 + steps)))
            average([own for _, own in pairs], [weight.detach() for weight, _ in pairs], None)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(weight, average) of each parameter that was stepped."""
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                if AVERAGE in self.optimizer.state.get(weight, ()):
                    yield weight, self.optimizer.state[weight][AVERAGE]

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the averages in the weights' place, and the weights in theirs; called again, back."""
        for weight, average in self.pairs():
            before = weight.detach().clone()
            weight.copy_(average)
            average.copy_(before)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model with averaged weights: to validate it, and to keep it."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()


def begin_averages(optimizer: torch.optim.Optimizer) -> None:
    """An average for each parameter that has a state, and none yet; before its first step the optimizer makes one."""
    for weight, state in optimizer.state.items():
        if state and AVERAGE not in state:
            state[AVERAGE] = weight.detach().clone()
