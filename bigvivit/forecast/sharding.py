"""When is it worth sharding a frozen tower: what it saves on each rank against what it moves in each step.

A model, held to no GPU. It assumes: a ring all-gather, in which each rank receives every layer's missing parts once for
each group of frames; one layer gathered while another computes; no backward, since the tower is frozen; links at
LINK_SHARE of their nominal rate, all ranks at once; matrix products at COMPUTE_SHARE of the card's; nothing else that
waits. Frames that go through a rank in a step are what a gather can hide behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bigvivit.forecast.accelerators import Accelerator
from bigvivit.units import DType, format_bytes

LINK_SHARE, COMPUTE_SHARE = 0.7, 0.4
"""Guesses of what is reached in practice; without a measurement of ours, like every figure made from them."""
GATHERED = 2
"""Layers that a rank has whole at once: the one that computes and the one that comes."""


@dataclass(frozen=True)
class TowerSize:
    """What sharding depends on."""

    stored_bytes: int
    largest_layer_bytes: int
    operations: int
    """Of one tubelet's forward: additions and multiplications of matrix products and convolutions."""


def size_tower(tower: nn.Module, units: list[nn.Module], pixels: torch.Tensor, itemsize: int) -> TowerSize:
    """Of a tower on the meta device whose weights take `itemsize` bytes each; `pixels` are one tubelet's.

    `units` are what is gathered at once.
    """
    sizes = [sum(parameter.numel() for parameter in unit.parameters()) * itemsize for unit in units]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(pixels)
    return TowerSize(sum(sizes), max(sizes), counter.get_total_flops())


@dataclass(frozen=True)
class BreakEven:
    """Replicating against sharding, for each rank."""

    saved_bytes: int
    """Less memory for the tower, the gathered layers taken off; negative where these are more."""
    moved_bytes: int
    """Received in each step."""
    gather_seconds: float
    compute_seconds: float
    """Of the tower, in each step."""
    tubelets: int
    """From so many per rank and step on, gathers hide behind compute: the break-even."""

    @property
    def waits_seconds(self) -> float:
        """What a step takes longer."""
        return max(0.0, self.gather_seconds - self.compute_seconds)


def break_even(tower: TowerSize, *, ranks: int, tubelets: int, groups: int, link: float, rate: float) -> BreakEven:
    """For `tubelets` per rank and step that go through the layers in `groups`; link in bytes and rate in operations per
    second, both as reached."""
    part = (ranks - 1) / ranks
    moved = int(tower.stored_bytes * part) * groups
    gather, one = moved / link, tower.operations / rate
    saved = int(tower.stored_bytes * part) - GATHERED * tower.largest_layer_bytes
    return BreakEven(saved, moved, gather, tubelets * one, math.ceil(gather / one))


def explain_sharding(
    tower: TowerSize, card: Accelerator, *, ranks: int, tubelets: int, groups: int, frames: int, compute: DType
) -> Iterator[str]:
    """Lines for people. `frames` are a tubelet's."""
    own = card.measured.rates.get(compute) if card.measured is not None else None
    how = "a model; nothing of it is measured" if own is None else "a model; the rate is measured"
    yield f"sharding the frozen tower over {ranks} ranks, instead of one on each ({how}):"
    rate = card.rates.get(compute) if own is None else own
    if card.link_bandwidth is None or rate is None:
        missing = "its link's rate" if card.link_bandwidth is None else f"its rate in {compute}"
        yield f"  nothing can be said for {card.name}: {missing} is not in the table"
        return
    link = card.link_bandwidth * LINK_SHARE
    share = COMPUTE_SHARE if own is None else 1.0
    found = break_even(tower, ranks=ranks, tubelets=tubelets, groups=groups, link=link, rate=rate * share)
    if found.saved_bytes <= 0:
        yield f"  saves nothing: {GATHERED} gathered layers are more than what a rank gives up"
        return
    stored, part = format_bytes(tower.stored_bytes), found.saved_bytes / card.memory_bytes
    yield f"  saves       {format_bytes(found.saved_bytes)} of {stored} on each rank, {part:.1%} of the card"
    yield (
        f"  moves       {format_bytes(found.moved_bytes)} a rank and step in {format_seconds(found.gather_seconds)}: "
        f"{card.link} at {LINK_SHARE:.0%} of {card.link_bandwidth / 1e9:.0f} GB/s"
    )
    yield (
        f"  computes    {tubelets} tubelets in {format_seconds(found.compute_seconds)}: {compute} at "
        f"{share:.0%} of {rate / 1e12:.3g} TFLOP/s"
    )
    yield (
        f"  break-even  {found.tubelets} tubelets ({found.tubelets * frames} frames) a rank and step: from there on "
        f"gathers hide behind compute"
    )
    if found.waits_seconds:
        longer = found.waits_seconds / found.compute_seconds
        wait = f"each step waits {format_seconds(found.waits_seconds)}, {longer:.0%} of the tower's own time"
        yield f"  so here     {wait}: worth it only where memory is short"
    else:
        yield "  so here     it costs next to no time: worth it as soon as the memory is of use"
    reached = card.measured.host_bandwidth if card.measured is not None else None
    if reached is None and card.host_bandwidth is not None:
        reached = card.host_bandwidth * LINK_SHARE
    if reached is not None:
        host = format_seconds(tower.stored_bytes * groups / reached)
        yield f"  instead     --memory.placement cpu saves as much on one rank, and fetches for {host} a step"


def format_seconds(seconds: float) -> str:
    """`0.35 s`, `12 ms`, `0.4 ms`."""
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1000:.2g} ms"
