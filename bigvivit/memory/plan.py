"""What is done to make a model fit, as data: nothing here touches a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bigvivit.units import DType, Storage, format_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How the tower is stored, where it lives and how frames go through it. Sharding is `ds`'s or `fsdp`'s."""

    storage: Storage = "bf16"
    """Form in which a frozen tower is kept; int8 and nf4 are bitsandbytes'. Stage 1 trains the tower, in fp32."""
    compute: DType | Literal["auto"] = "auto"
    """Element type a frozen tower computes in. `auto` is bf16 where the device has bf16 units, else fp32, cast layer
    by layer so that storage keeps its size."""
    autocast: Literal["auto", "fp32", "bf16"] = "auto"
    """Element type of matrix products in what is trained; its weights stay fp32. `auto` is bf16 on CUDA where the card
    has bf16 units, else fp32. (fp16 would need its loss scaled.)"""
    placement: Literal["device", "cpu", "disk"] = "device"
    """Where a frozen tower lives: on the device (there ZeRO-3 and FSDP2 shard it), in the host's memory, or in a file
    beside the run. The next layer is fetched while one computes."""
    group: int | Literal["all", "auto"] = "auto"
    """Tubelets whose hidden states are in memory at once; each layer is fetched once for all of them."""
    chunk: int | Literal["all", "auto"] = "auto"
    """Tubelets that go through a layer at once. group = chunk = all is the paper's way."""
    recompute: int = 0
    """Every n-th trained block computes its activations once more in the backward; 0 keeps all of them."""
    offload_activations: bool = False
    """What trained parts save for the backward waits in the host's memory."""
    masters: Literal["fp32", "bf16"] = "fp32"
    """Element type of trained weights and their gradients and, but for 8-bit optimizers, of the optimizer's state.
    ZeRO keeps weights and state in fp32 beside that, shared out over the ranks."""


@dataclass(frozen=True)
class Stream:
    """How many tubelets are alive, and how many compute, at once."""

    group: int
    chunk: int
    why: str


CHUNK = 16
"""Tubelets that keep a device busy where there is room. On an H100 chunks of 16 of ViT-g, 4,112 tokens, took 0.70 of
the time of chunks of 8, and chunks of 32 no less (bench/results/chunks_nvidia-h100-80gb-hbm3_2026-11-26.json)."""
SHARE_OF_WORK, SHARE_OF_HIDDEN = 0.25, 0.5
"""Of the memory that is free: for one chunk's work in a layer, and for the hidden states of a group."""


def choose_stream(
    plan: MemoryPlan, *, tubelets: int, hidden_bytes: int, work_bytes: int, free_bytes: int, costly: bool
) -> Stream:
    """What `auto` comes to for a clip of so many tubelets.

    `hidden_bytes` and `work_bytes` are one tubelet's, between two layers and inside one; `costly` says whether a layer
    has to be fetched, gathered, cast or unpacked before it can compute.
    """
    if plan.chunk == "auto":
        chunk = max(1, min(tubelets, CHUNK, int(free_bytes * SHARE_OF_WORK) // max(work_bytes, 1)))
        why = (
            f"chunks of {chunk}: {format_bytes(chunk * work_bytes)} of work in {format_bytes(free_bytes)} that are free"
        )
    else:
        chunk = tubelets if plan.chunk == "all" else min(plan.chunk, tubelets)
        why = f"chunks of {chunk} as set"
    if plan.group != "auto":
        group = tubelets if plan.group == "all" else min(plan.group, tubelets)
        return Stream(group, chunk, f"groups of {group} as set, {why}")
    if not costly:
        return Stream(chunk, chunk, f"chunk by chunk, since the layers are there as they compute; {why}")
    room = int(free_bytes * SHARE_OF_HIDDEN) // max(hidden_bytes, 1)
    group = max(chunk, min(tubelets, room // chunk * chunk))
    size = format_bytes(group * hidden_bytes)
    if group == tubelets:
        return Stream(group, chunk, f"layer by layer, so that each is fetched once for {size} of hidden states; {why}")
    return Stream(
        group, chunk, f"layer by layer in groups of {group}, whose hidden states take {size}: no more fit; {why}"
    )
