"""What a CUDA run allocates otherwise than the fake CPU tensors that are traced: differences by name, to be left out.

Sizes follow PyTorch's source; whole traces were compared with an H100 (README, Evidence), these alone with no GPU. A
trace for a CPU target applies none but `in-place`, which the CPU allocator's own count shows.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from bigvivit.forecast.accelerators import Accelerator, Kernel
from bigvivit.forecast.tracker import Tracker

Name = Literal["attention", "foreach", "in-place", "workspaces"]


@dataclass(frozen=True)
class Correction:
    """One difference."""

    name: Name
    what: str
    source: str


CORRECTIONS = (
    Correction(
        "attention",
        "scaled_dot_product_attention by the kernel that card, type and shape get, with what it keeps and its scratch",
        "sdp_utils.cpp; flash_api.cpp, mha_bwd; mem_eff_attention/kernel_backward.h (half types there: an upper bound)",
    ),
    Correction(
        "foreach",
        "optimizers and clipping take all parameters at once, and so do their temporaries",
        "torch/optim/optimizer.py, _default_to_fused_or_foreach",
    ),
    Correction(
        "in-place",
        "autograd adds to gradients that nobody else holds, and scatters into them; for CPU targets too, since only "
        "fake tensors do otherwise",
        "input_buffer.cpp; FunctionsManual.cpp",
    ),
    Correction(
        "workspaces",
        "cuBLAS has one for each thread that runs matrix products: the caller's and autograd's",
        "CublasHandlePool.cpp, see forecast/overhead.py",
    ),
)


@contextmanager
def as_on_cuda(tracker: Tracker, card: Accelerator, without: Collection[Name] = ()) -> Iterator[None]:
    """Inside, operators allocate as on this card, but for the corrections that are left out by name."""
    with ExitStack() as stack:
        if "attention" not in without:
            stack.enter_context(attend_as_on_cuda(tracker, card.kernels))
        if "foreach" not in without:
            stack.enter_context(foreach_as_on_cuda())
        yield


@contextmanager
def foreach_as_on_cuda() -> Iterator[None]:
    """PyTorch takes fake tensors on the CPU for what it would update all at once."""
    modules = [sys.modules[f"torch.{name}"] for name in ("utils._foreach_utils", "optim.optimizer")]
    devices = modules[0]._get_foreach_kernels_supported_devices
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(
                patch.object(module, "_get_foreach_kernels_supported_devices", lambda: [*devices(), "cpu"])
            )
            types = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(patch.object(module, "_foreach_supported_types", types))
        yield


def choose_kernel(kernels: Collection[Kernel], query: Tensor, *, masked: bool) -> Kernel:
    """sdp_utils.cpp: flash for half types without a mask; memory-efficient where rows are aligned to 16 bytes."""
    if query.dim() == 4:
        if "flash" in kernels and query.dtype.itemsize == 2 and not masked and query.shape[-1] <= 256:
            return "flash"
        if "memory_efficient" in kernels and query.shape[-1] * query.dtype.itemsize % 16 == 0:
            return "memory_efficient"
    return "math"


@contextmanager
def attend_as_on_cuda(tracker: Tracker, kernels: Collection[Kernel]) -> Iterator[None]:
    """Replace the function that everybody calls for attention."""
    original = F.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Any:
        if torch.is_autocast_enabled(query.device.type):  # as it does for the operator
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        kernel = choose_kernel(kernels, query, masked=attn_mask is not None)
        if kernel == "math":
            with tracker.operator("attention: math"), sdpa_kernel(SDPBackend.MATH):
                return original(query, key, value, attn_mask, *rest, **more)
        with tracker.operator(f"attention: {kernel}"):
            return FusedAttention.apply(query, key, value, kernel, tracker)

    with patch.object(F, "scaled_dot_product_attention", attend):
        yield


class FusedAttention(torch.autograd.Function):
    """What a fused kernel allocates, and keeps for its backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, tracker: Tracker) -> Tensor:
        batch, heads, length, _ = query.shape
        # Heads lie inside of tokens, so that joining them needs no copy.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.kernel, ctx.tracker = kernel, tracker
        trains = any(ctx.needs_input_grad[:3])
        if kernel == "flash":
            sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        else:  # only for a backward, in rows of 32
            sums = query.new_empty(batch, heads, up(length, 32) if trains else 0, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        tracker.flops[tracker.step] += sdpa_flop_count(query.shape, key.shape, value.shape)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        batch, heads, length, width = query.shape
        flops = sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)
        ctx.tracker.flops[ctx.tracker.step] += flops
        with ctx.tracker.operator(f"attention: {ctx.kernel}, backward"):
            grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
            if ctx.kernel == "flash":
                rows, columns = up(length, 128), up(width, 32 if width <= 128 else 64)
            else:  # fp32 is added up where it is; half types are in tiles beside
                rows, columns = up(length, 64), up(width, 64) if query.dtype.itemsize == 2 else 0
            scratch = [query.new_empty(batch, heads, rows, size, dtype=torch.float32) for size in (1, columns) if size]
            del scratch
        return *grads, None, None


def up(size: int, step: int) -> int:
    """The next multiple."""
    return -(-size // step) * step
