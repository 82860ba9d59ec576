"""What is done to make a model fit, as data: nothing here touches a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bigvivit.units import DType


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How the tower is stored and computed. Stage 1 trains the tower, so there it is stored in fp32."""

    storage: DType = "bf16"
    """Element type in which a frozen tower is kept and sharded."""
    compute: DType | Literal["auto"] = "auto"
    """Element type a frozen tower computes in. `auto` is bf16 where the device has bf16 units, else fp32, cast layer
    by layer so that storage keeps its size."""
    autocast: Literal["auto", "fp32", "bf16"] = "auto"
    """Element type of matrix products in what is trained; its weights stay fp32. `auto` is bf16 on CUDA where the card
    has bf16 units, else fp32. (fp16 would need its loss scaled.)"""
