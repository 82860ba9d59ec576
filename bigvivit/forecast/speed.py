"""How long a step takes, by a roofline: operations over rates, bytes over bandwidths, each at a range of efficiency.

Operations are those that the trace met, by the formulas of `torch.utils.flop_counter`. The efficiencies are taken, not
measured: no step of ours has been timed on a GPU. Norms, activations and other memory-bound work count as nothing of
their own; they are why matrix products reach only a part of the rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import Accelerator, Rate

aten = torch.ops.aten
EFFICIENCY_OF_PRODUCTS = (0.6, 0.4, 0.2)
"""Best, expected and worst share of the dense rate that a transformer's step reaches. Taken."""
EFFICIENCY_OF_TRANSFERS = (0.9, 0.7, 0.4)
"""Of bandwidths and links. Taken."""


def count_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Operations of one call, multiplications and additions apart; 0 for what is no matrix product."""
    packet = func._overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*head_shapes(*args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(args[0].shape, *head_shapes(*args[1:4])))
    formula: Any = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def head_shapes(query: Tensor, key: Tensor, value: Tensor) -> list[tuple[int, ...]]:
    """Shapes of an attention's inputs [b, heads, n, d], keys and values with as many heads as queries: those that
    several queries share are multiplied with each, and formulas before torch 2.14 refuse them."""
    return [(shape[0], query.shape[1], *shape[2:]) for shape in (query.shape, key.shape, value.shape)]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one rank does in a step."""

    flops: int
    rate: Rate
    """Element type of nearly all of them."""
    tower_bytes: int = 0
    """A frozen tower as it is stored; 0 where it trains."""
    reads: int = 1
    """Times that all of its weights are read by the device: once for each chunk."""
    fetches: int = 0
    """Times that they come from the host or, sharded, from other devices: once for each group."""
    sharded: bool = False
    """They, and the trained weights, come from other devices."""
    trained_bytes: int = 0
    """Trained weights."""
    ranks: int = 1


def forecast_seconds(work: Work, accelerator: Accelerator) -> dict[str, tuple[float, float, float]]:
    """(best, expected, worst) seconds of each part of a step, and of the `step`.

    At best everything overlaps and the longest part is the step; at worst nothing does and they add up; expected, the
    transfers overlap the products and the longer of both is the step. Raises ConfigError for what the table has no rate
    or bandwidth of.
    """
    across = (work.ranks - 1) / work.ranks
    gathered = work.tower_bytes * work.fetches + (2 * work.trained_bytes if work.sharded else 0)
    loads = {
        "products": (work.flops, accelerator.rates.get(work.rate), f"rate in {work.rate}"),
        # Weights and momentum are read and written, gradients read.
        "memory": (work.tower_bytes * work.reads + 5 * work.trained_bytes, accelerator.bandwidth, "bandwidth"),
        "host": (0 if work.sharded else work.tower_bytes * work.fetches, accelerator.host_bandwidth, "host link"),
        # An all-reduce sends everything twice, a gather and a reduce-scatter each once.
        "link": (
            across * (gathered + work.trained_bytes if work.sharded else 2 * work.trained_bytes),
            accelerator.link_bandwidth,
            "link",
        ),
    }
    seconds: dict[str, tuple[float, float, float]] = {}
    for name, (load, speed, what) in loads.items():
        if load and speed is None:
            raise ConfigError(f"{what} of {accelerator.name} is not in the table: nothing can be said of its seconds")
        shares = EFFICIENCY_OF_PRODUCTS if name == "products" else EFFICIENCY_OF_TRANSFERS
        seconds[name] = tuple(load / (speed * share) if speed else 0.0 for share in shares)  # type: ignore[assignment]
    best, expected, worst = zip(*seconds.values(), strict=True)
    products, memory, *moved = expected
    return {**seconds, "step": (max(best), max(products, memory, *moved), sum(worst))}
