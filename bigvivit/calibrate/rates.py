"""Rows about rates: links, disk and matrix products, as one call after another reaches them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigvivit.assemble import choose_device
from bigvivit.calibrate.device import seconds_of
from bigvivit.memory.placement import DiskPlacement

REPEATS = 5
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def measure_link(nbytes: int) -> dict[str, Any]:
    """Bytes per second between the host and the GPU, from page-locked and from other memory, and of the GPU's own."""
    device = choose_device("cuda")
    there, other = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    pageable = torch.zeros(nbytes, dtype=torch.uint8)

    def rate(source: Tensor, target: Tensor) -> float:
        return nbytes / seconds_of(lambda: target.copy_(source, non_blocking=True), device, REPEATS)

    return {
        "to_gpu_pinned_per_second": rate(pinned, there),
        "to_gpu_pageable_per_second": rate(pageable, there),
        "to_host_pinned_per_second": rate(there, pinned),
        "to_host_pageable_per_second": rate(there, pageable),
        "memory_per_second": 2 * rate(there, other),  # read and written
    }


def measure_memory(nbytes: int) -> dict[str, Any]:
    """Bytes per second of a CPU's memory: read and written by one copy."""
    source, target = (torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2))
    return {"memory_per_second": 2 * nbytes / seconds_of(lambda: target.copy_(source), torch.device("cpu"), REPEATS)}


def measure_disk(device: str, nbytes: int) -> dict[str, Any]:
    """Bytes per second from a tower's file to the device, as a tower on disk is fetched: the file read anew, as far as
    the kernel lets go of it, and from the page cache."""
    where = choose_device(device)
    placement = DiskPlacement(where, Path(tempfile.gettempdir()))
    number = placement.store(torch.zeros(nbytes, dtype=torch.uint8))
    file = placement.file.fileno()
    os.fsync(file)

    def forget() -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def fetch() -> Tensor:
        return placement.fetch(number).wait()

    def fetch_anew() -> Tensor:
        forget()
        return fetch()

    anew, cached = (seconds_of(work, where, REPEATS) for work in (fetch_anew, fetch))
    return {"anew_per_second": nbytes / anew, "cached_per_second": nbytes / cached}


def measure_products(device: str, side: int) -> dict[str, Any]:
    """Operations per second of square matrix products by element type; on a GPU also of fp32 rounded to TF32."""
    where = choose_device(device)
    found: dict[str, Any] = {"size": side}
    for name, dtype in TYPES.items():
        found[f"{name}_per_second"] = product_rate(where, side, dtype)
    if where.type == "cuda":
        where = choose_device(device, tf32=True)
        try:
            found["tf32_per_second"] = product_rate(where, side, torch.float32)
        finally:
            choose_device(device)
    return found


def product_rate(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """Multiplications and additions apart."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, device, REPEATS)
