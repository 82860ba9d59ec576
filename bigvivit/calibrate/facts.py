"""Rows about what forecasts take from tables: context, workspaces, scratch, kernels; and of a CPU the process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bigvivit.calibrate.device import clear, cuda, outside_bytes, used_bytes
from bigvivit.units import GiB

SIDE = 1024
SHAPES = {"vit-b": (12, 64, 197), "vit-h": (16, 80, 257), "vit-g": (16, 88, 257)}
"""Heads, width of one and tokens of towers' attention."""
KERNELS = {"Flash": "flash", "Efficient": "memory_efficient", "Cudnn": "cudnn", "Math": "math"}
"""Words in the names of autograd's nodes."""


def measure_context() -> dict[str, Any]:
    """What one tensor costs in a process that had nothing: the context, by NVML and by the driver.

    The driver counts other programs' memory too; where NVML answers, which can be asked before, they are told apart.
    """
    before = used_bytes()
    device = cuda()
    held = torch.empty(1, device=device)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    reserved, own, after = torch.cuda.memory_reserved(), outside_bytes(), used_bytes()
    by_driver = total - free - reserved
    if own is not None:
        counted, context = "NVML, this process", own
    elif before is not None and after is not None:
        counted, context = "NVML, before and after", after - before - reserved
    else:
        counted, context = "driver, other programs included", by_driver
    del held
    return {
        "context_bytes": context,
        "others_bytes": by_driver - context,
        "counted_by": counted,
        "memory_bytes": total,
    }


def measure_workspaces() -> dict[str, Any]:
    """What libraries ask of PyTorch's allocator, one kind of work after the other, the same process throughout: kept
    after the call, and scratch that was given back; and what the driver has loaded meanwhile."""
    device = cuda()
    clear()
    found: dict[str, Any] = {}
    for name, work in list_works(device):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = work()
        torch.cuda.synchronize()
        peak, own = torch.cuda.max_memory_allocated() - before, output.nbytes if output is not None else 0
        del output
        kept = torch.cuda.memory_allocated() - before
        found[f"{name}_kept_bytes"] = kept
        found[f"{name}_scratch_bytes"] = max(peak - kept - own, 0)
    return {**found, "outside_bytes": outside_bytes()}


def list_works(device: torch.device) -> list[tuple[str, Callable[[], Tensor | None]]]:
    """Each gives its only new tensor, or none."""
    a, b, out = (torch.randn(SIDE, SIDE, device=device) for _ in range(3))
    half, other = a.bfloat16(), b.bfloat16()
    low, bias = half.clone(), half[0].clone()
    weight = torch.randn(SIDE, SIDE, device=device, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    image = torch.randn(8, 6, 224, 224, device=device)
    kernel = torch.randn(SIDE, 6, 14, 14, device=device)
    small_image, small_kernel = image.bfloat16(), kernel.bfloat16()

    def backward() -> None:
        (a @ weight).sum().backward()

    return [
        ("product_fp32", lambda: drop(torch.mm(a, b, out=out))),
        ("product_bf16", lambda: drop(torch.mm(half, other, out=low))),
        ("linear_bf16", lambda: F.linear(half, other, bias)),
        ("convolution_bf16", lambda: F.conv2d(small_image, small_kernel, stride=14)),
        ("convolution_fp32", lambda: F.conv2d(image, kernel, stride=14)),
        ("norm", lambda: F.layer_norm(half, (SIDE,))),
        ("backward_fp32", backward),
    ]


def drop(output: Tensor) -> None:
    """For works that write into what was there."""


def choose_kernels() -> dict[str, Any]:
    """Which kernel attention takes for towers' shapes, by the node it leaves for the backward, and without one by
    PyTorch's own choice."""
    from torch.nn.attention import SDPBackend

    device, found = cuda(), {}
    for name, (heads, width, tokens) in SHAPES.items():
        for word, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
            q, k, v = (torch.randn(2, heads, tokens, width, device=device, dtype=dtype) for _ in range(3))
            frozen = int(torch.ops.aten._fused_sdp_choice(q, k, v))
            node = F.scaled_dot_product_attention(q.requires_grad_(), k.requires_grad_(), v.requires_grad_()).grad_fn
            own = type(node).__name__
            found[f"{name}_{word}_trains"] = next((kernel for part, kernel in KERNELS.items() if part in own), "math")
            found[f"{name}_{word}_frozen"] = name_kernel(SDPBackend, frozen)
    return found


def name_kernel(backends: Any, number: int) -> str:
    """As the table of accelerators calls it."""
    words = {
        int(backends.FLASH_ATTENTION): "flash",
        int(backends.EFFICIENT_ATTENTION): "memory_efficient",
        int(backends.CUDNN_ATTENTION): "cudnn",
        int(backends.MATH): "math",
    }
    return words.get(number, str(number))


def measure_process(trial: str) -> dict[str, Any]:
    """Of a CPU: what a process holds that has imported everything, and what libraries take in a step beside tensors."""
    from bigvivit.forecast.trace import STEPS
    from bigvivit.memory.measure import measure_data, read_status
    from bigvivit.trial import Trial, trace_trial
    from bigvivit.trial_run import run_trial

    before = measure_data()
    own = Trial.from_json(trial)
    imports = read_status("VmRSS")
    after = int(run_trial(own, STEPS, torch.device("cpu"))["data_bytes"])
    tensors = trace_trial(own, free_bytes=GiB).left_bytes()
    return {
        "imports_data_bytes": before,
        "imports_resident_bytes": imports,
        "libraries_bytes": max(after - before - tensors, 0),
        "threads": torch.get_num_threads(),
        "trial": json.loads(trial)["tower"],
    }
