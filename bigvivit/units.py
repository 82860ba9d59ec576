"""Bytes and element types: the two units every other module counts in."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

KiB, MiB, GiB = 1024, 1024**2, 1024**3

DType = Literal["fp32", "bf16", "fp16"]
Storage = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
TORCH_NAMES: dict[DType, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def torch_dtype(name: DType) -> torch.dtype:
    """The torch dtype of a configured one. torch is imported here, so that configs can be checked without it."""
    import torch

    dtype = getattr(torch, TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def format_bytes(count: int) -> str:
    """`1.88 GiB`, `19.3 MiB`, `0 B`: three significant digits, binary units."""
    for unit, size in (("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"  # .3g writes 1020 as 1.02e+03
    return f"{count} B"


def format_count(count: int) -> str:
    """`1.01 B`, `632 M`, `85.8 k`: parameters and the like, decimal units."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def parse_bytes(text: str) -> int:
    """Bytes of `22.5GiB`, `512 MiB`, `80e9` or `24GB` (decimal). Raises ValueError for anything else or nothing."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?)\s*(?:([KMGT])(i?)B|B)?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no amount of memory")
    number, prefix, binary = match.groups()
    count = int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(prefix or " ")))
    if count <= 0:
        raise ValueError(f"{text!r} is no amount of memory")
    return count
