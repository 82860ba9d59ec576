"""Weights that are made on the host and stay as they were allocated: what nobody writes takes no memory there.

For `bigvivit dryrun --skip-init`, in the program's own process: values do not matter on a virtual GPU, and pages that
are never written are never there, so a model may be larger than the host's memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

LEAST_BYTES = 1 << 20
"""Smaller tensors are filled as ever: a virtual GPU knows their values."""
METHODS = ("normal_", "uniform_", "log_normal_", "exponential_", "cauchy_", "geometric_", "random_")
"""Of tensors: what fills with random numbers."""


def skip_init(torch: ModuleType) -> None:
    """Let torch.nn.init and what fills tensors at random leave the host's larger tensors alone."""
    for name in [name for name in vars(torch.nn.init) if name.endswith("_") and not name.startswith("_")]:
        setattr(torch.nn.init, name, leaving_alone(getattr(torch.nn.init, name)))
    for name in METHODS:
        setattr(torch.Tensor, name, leaving_alone(getattr(torch.Tensor, name)))


def leaving_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but for the host's larger tensors, which it returns as they are."""

    @functools.wraps(function)
    def fill(*args: Any, **kwargs: Any) -> Any:
        tensor = args[0] if args else kwargs.get("tensor")
        if tensor is not None and tensor.device.type == "cpu" and tensor.nbytes >= LEAST_BYTES:
            return tensor
        return function(*args, **kwargs)

    return fill
