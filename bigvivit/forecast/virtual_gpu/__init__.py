"""PyTorch's CUDA build on NVIDIA cards that are not there: its allocator, dispatcher and kernels' choice, no device.

`environment` starts any program so, `virtual_gpu` calls a function in a child process, `is_active` and `driver_bytes`
serve inside. What is real and what is not: docs/virtual_gpu.md. Importing this imports neither torch nor tyro.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigvivit.forecast.virtual_gpu.inside import driver_bytes, estimates, hold_events, is_active, launches

if TYPE_CHECKING:
    from bigvivit.forecast.virtual_gpu.session import VirtualGpuError, environment, virtual_gpu

__all__ = [
    "VirtualGpuError",
    "driver_bytes",
    "environment",
    "estimates",
    "hold_events",
    "is_active",
    "launches",
    "virtual_gpu",
]


def __getattr__(name: str) -> Any:
    """What starts children needs the table of cards, which a child does without."""
    if name in ("environment", "virtual_gpu", "VirtualGpuError"):
        from bigvivit.forecast.virtual_gpu import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
