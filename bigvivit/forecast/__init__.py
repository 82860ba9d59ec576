"""What a training step costs on hardware that is not here. For other programs than ours: `trace_step`."""

from __future__ import annotations

from typing import Any

__all__ = ["fake_tensors", "trace_step"]


def __getattr__(name: str) -> Any:
    """Import PyTorch only when it is needed."""
    if name in __all__:
        from bigvivit.forecast import program

        return getattr(program, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
