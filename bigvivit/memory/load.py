"""Weights into a model that has none yet, one piece at a time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from bigvivit.memory.placement import Placement
from bigvivit.memory.quantize import is_quantized, value_dtype
from bigvivit.memory.stream import StreamedLayer
from bigvivit.units import KiB, MiB, Storage

LOADING_THRESHOLD = 64 * KiB
"""Bytes from which malloc asks the kernel for memory of its own while loading."""
USUAL_THRESHOLD = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", 32 * MiB))
"""The same after it: what the user told glibc, or its own maximum, which it comes to by itself."""
M_MMAP_THRESHOLD = -3
"""glibc's number for it (malloc.h)."""

Fill = Callable[[str, nn.Module], None]
"""Copies the weights of the piece of this name into a module on the CPU that has room for them."""


class Sharder(Protocol):
    """Keeps this rank's part of a model and lets go of the rest."""

    forgets_shapes: bool
    """Whether a weight that is not gathered has another shape: ZeRO-3's have none."""

    def shard(self, unit: nn.Module) -> None:
        """One unit of the tower, just filled."""
        ...

    def finish(self, model: nn.Module) -> None:
        """All that is left, once the tower is done."""
        ...


@contextmanager
def memory_goes_back() -> Iterator[None]:
    """What is freed inside goes back to the kernel, not to malloc's heap.

    There the short-lived buffers of one layer and the long-lived ones that are made between them would leave holes that
    nothing fits in: packing a tower into int8 kept four times its bytes. Where malloc is not glibc's, nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LOADING_THRESHOLD)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, USUAL_THRESHOLD)


@memory_goes_back()
def load_pieces(
    pieces: Iterable[tuple[str, nn.Module]],
    units: Iterable[nn.Module],
    fill: Fill,
    *,
    storage: torch.dtype,
    device: torch.device,
    sharder: Sharder | None,
) -> None:
    """Materialise, fill and place each piece before the next one exists.

    At no time is more than one piece whole in memory beside what has been placed: with a sharder, a rank never holds
    the tower. The pieces come on the meta device; they are filled in `storage`, so no copy in the file's type is kept.
    `units` are what is sharded for each: the piece itself, or what it was wrapped in.
    """
    for (name, piece), unit in zip(pieces, units, strict=True):
        piece.to(storage).to_empty(device="cpu")
        fill(name, piece)
        piece.to(device)  # also before sharding, which moves parameters but not buffers
        if sharder is not None:
            sharder.shard(unit)


@memory_goes_back()
def load_packed(
    pieces: Iterable[tuple[str, nn.Module]],
    units: Iterable[StreamedLayer],
    fill: Fill,
    storage: Storage,
    placement: Placement,
) -> None:
    """Fill, pack and hand over each piece before the next one exists: the whole tower is in no form but its stored one.

    What is quantised is filled in fp32, so that it is rounded once.
    """
    for (name, piece), unit in zip(pieces, units, strict=True):
        piece.to(torch.float32 if is_quantized(storage) else value_dtype(storage)).to_empty(device="cpu")
        fill(name, piece)
        placement.store(unit.pack(storage))
