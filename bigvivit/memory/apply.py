"""Every memory trick, in the one order in which they work."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from bigvivit.memory.activations import apply_offload, apply_recompute
from bigvivit.memory.freeze import freeze
from bigvivit.memory.load import Fill, Sharder, load_packed, load_pieces
from bigvivit.memory.measure import least_over_ranks, measure_free
from bigvivit.memory.placement import DevicePlacement, Placement, build_placement
from bigvivit.memory.plan import MemoryPlan, Stream, choose_stream
from bigvivit.memory.quantize import is_quantized, value_dtype
from bigvivit.memory.stream import FrozenTower, StagedTower
from bigvivit.units import torch_dtype

STATES = 2
"""Times the trained weights' size, kept free for the optimizer: AdamW's two moments, or SGD's one and the gradients."""


def apply_plan(
    model: nn.Module,
    plan: MemoryPlan,
    *,
    frozen: bool,
    fill: Fill,
    device: torch.device,
    sharder: Sharder | None = None,
    scratch: Path | None = None,
    free_bytes: int | None = None,
) -> None:
    """Make `model`, whose `tower` is still on the meta device, fit and ready to train: in place.

    `fill` brings the tower's weights; `sharder` (ZeRO-3, FSDP2) keeps this rank's part of them; `scratch` is a folder
    for the file of a tower that lives on disk, where temporary files go by default. `free_bytes` is what there is for
    the model and all its work: by default what is free, of which loading leaves less.
    """
    tower = cast(StagedTower, model.tower)
    pieces = tower.pieces()  # under the names that checkpoints know, so before anything is wrapped
    units: Sequence[nn.Module] = [piece for _, piece in pieces]
    storage, placement = torch_dtype(plan.masters), None
    # Before sharding, which keeps types. (What is on the meta device gets its own below.)
    model.to(storage)
    if frozen:
        # Before sharding and before the optimizer: both look at requires_grad when they are handed a parameter.
        freeze(cast(nn.Module, tower))
        compute = compute_dtype(plan, device)
        if is_packed(plan):
            placement = build_placement(plan.placement, device, scratch or Path(tempfile.gettempdir()))
        costly = sharder is not None or plan.placement != "device" or compute != value_dtype(plan.storage)

        def choose(tubelets: int, hidden_bytes: int, work_bytes: int) -> Stream:
            return choose_stream(
                plan,
                tubelets=tubelets,
                hidden_bytes=hidden_bytes,
                work_bytes=work_bytes,
                free_bytes=left_bytes,
                costly=costly or is_quantized(plan.storage),
            )

        # Before sharding: a StreamedLayer is the unit that is gathered.
        model.tower = stream = FrozenTower(tower, compute, device, choose, placement)
        units, storage = stream.units(), value_dtype(plan.storage)
    if placement is not None:
        load_packed(pieces, stream.units(), fill, plan.storage, placement)
    else:
        load_pieces(pieces, units, fill, storage=storage, device=device, sharder=sharder)
    # After loading: the units are sharded one by one as they come, what is around them at the end.
    if sharder is None:
        model.to(device)
    else:
        sharder.finish(model)
    if frozen:
        held, trained = held_bytes(model, placement)
        # Measured: the least over the ranks, so that all fetch as often.
        left = least_over_ranks(measure_free(device), device) if free_bytes is None else free_bytes - held
        left_bytes = max(left - STATES * trained, 0)
    if plan.recompute:
        apply_recompute(model, plan.recompute, reentrant=sharder is not None and sharder.forgets_shapes)
    if plan.offload_activations:
        apply_offload(model, device)
    autocast = autocast_dtype(plan, device)
    if autocast != torch.float32:
        # Around the module's own forward, not around the engine's: DeepSpeed switches off an autocast it did not start.
        model.forward = torch.autocast(device.type, dtype=autocast)(cast(Any, model).forward)


def is_packed(plan: MemoryPlan) -> bool:
    """Whether the tower's weights are bytes that a placement keeps, and not parameters that engines see."""
    return plan.placement != "device" or is_quantized(plan.storage)


def held_bytes(model: nn.Module, placement: Placement | None) -> tuple[int, int]:
    """(all, trained) bytes of weights that this rank has on the device."""
    held = sum(buffer.nbytes for buffer in placement.buffers) if isinstance(placement, DevicePlacement) else 0
    trained = 0
    for parameter in model.parameters():
        part = getattr(parameter, "ds_tensor", parameter.data)  # ZeRO-3's share of it
        part = getattr(part, "_local_tensor", part)  # FSDP2's
        held += part.nbytes
        trained += part.nbytes if parameter.requires_grad else 0
    return held, trained


def compute_dtype(plan: MemoryPlan, device: torch.device) -> torch.dtype:
    """The type a frozen tower computes in on this device."""
    if plan.compute != "auto":
        return torch_dtype(plan.compute)
    return torch.bfloat16 if has_bf16_units(device) else torch.float32


def autocast_dtype(plan: MemoryPlan, device: torch.device) -> torch.dtype:
    """The type of matrix products in what is trained. On CPUs fp32, so that engines and machines agree."""
    if plan.autocast != "auto":
        return torch_dtype(plan.autocast)
    return torch.bfloat16 if device.type == "cuda" and has_bf16_units(device) else torch.float32


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 matrix products run at full speed; emulated ones are several times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities()
    if flags["architecture"] == "x86_64":  # oneDNN also calls bf16 supported where it emulates it with AVX-512
        return bool(flags["avx512_bf16"] or flags["amx_bf16"])
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
