"""The forms a frozen weight can be stored in, by bitsandbytes' functions rather than its modules.

Its modules keep their state in ways that sharding, our own placements and fake tensors do not see.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bigvivit.units import Storage, torch_dtype
from bigvivit.versions import require_known

NF4_BLOCK = 64
"""Weights that share a scale: bitsandbytes' and QLoRA's choice (arXiv:2305.14314, §3)."""
CODES, SCALES = "#codes", "#scales"
"""Endings of the two tensors that stand for a quantised one."""


def is_quantized(storage: Storage) -> bool:
    """Whether codes are kept instead of values."""
    return storage in ("int8", "nf4")


def value_dtype(storage: Storage) -> torch.dtype:
    """The type of what is kept as values: everything, or, beside codes, all but the matrices of linear layers."""
    if storage == "int8" or storage == "nf4":
        return torch.bfloat16
    return torch_dtype(storage)


def pack_weights(module: nn.Module, storage: Storage) -> dict[str, Tensor]:
    """A module's parameters as they are stored. Biases, norms, kernels and tables are small, and kept as values."""
    matrices = {
        f"{name}.weight" if name else "weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)
    }
    stored: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        weight = parameter.detach()
        if is_quantized(storage) and name in matrices:
            stored[name + CODES], stored[name + SCALES] = quantize(weight, storage)
        else:
            stored[name] = weight.to(value_dtype(storage))
    return stored


def unpack_weights(stored: dict[str, Tensor], module: nn.Module, compute: torch.dtype) -> dict[str, Tensor]:
    """The parameters of `module`, whose shapes are looked up there, in the type they compute in.

    What already has that type is not copied.
    """
    weights = {}
    for name, parameter in module.named_parameters():
        if name in stored:
            weights[name] = stored[name].to(compute)
        else:
            weights[name] = dequantize(stored[name + CODES], stored[name + SCALES], parameter.shape, compute)
    return weights


def quantize(weight: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix [out, in]: int8 with a scale per row, or nf4, two to a byte, a scale per block."""
    import bitsandbytes.functional as bnb  # here: it looks for CUDA when it is imported

    if storage == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight)
        return codes, scales
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=NF4_BLOCK)
    return codes, state.absmax


def dequantize(codes: Tensor, scales: Tensor, shape: torch.Size, compute: torch.dtype) -> Tensor:
    """The matrix that codes and scales stand for."""
    import bitsandbytes.functional as bnb

    if codes.dtype == torch.int8:
        return (codes * (scales / 127).unsqueeze(1)).to(compute)  # bitsandbytes' own is this, with more temporaries
    # As rows of one block: on CPUs bitsandbytes 0.50 takes every row for the start of a block, and 4,304 values in a
    # row, as SigLIP So400m has, would be multiplied by other blocks' scales.
    count = shape.numel()
    rows = torch.Size([count // NF4_BLOCK, NF4_BLOCK] if count % NF4_BLOCK == 0 else [1, count])
    state = bnb.QuantState(
        absmax=scales, shape=rows, blocksize=NF4_BLOCK, quant_type="nf4", dtype=compute
    )  # without the table of values, which its kernels have, and which would have to be copied to the device each time
    return bnb.dequantize_4bit(codes, state).view(shape)


@contextmanager
def eight_bit_on_fake_tensors(*, in_place: bool) -> Iterator[None]:
    """Make bitsandbytes' 8-bit optimizers run on fake tensors; `in_place` as on CUDA, where a kernel updates what is
    there. On CPUs they are written in PyTorch, and unpack each state to fp32 while they update it."""
    require_known("a forecast of an 8-bit optimizer", "bitsandbytes")
    import bitsandbytes
    from bitsandbytes.backends.cpu import ops

    def fill_qmap(optimizer: Any) -> None:
        # The values of codes, which bitsandbytes computes: an operator would have to read them.
        optimizer.name2qmap |= {name: torch.empty(256) for name in ("dynamic", "udynamic")}

    with ExitStack() as stack:
        stack.enter_context(patch.object(bitsandbytes.optim.optimizer.Optimizer8bit, "fill_qmap", fill_qmap))
        # Its operators have no form for fake tensors. What they call on CPUs is PyTorch again.
        for name in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit"):
            update = (lambda *_: None) if in_place else getattr(ops, f"_{name}_cpu")
            stack.enter_context(patch.object(torch.ops.bitsandbytes, name, update))
        yield
