"""What a forward saves for its backward, in the host's memory meanwhile: copied there and back beside the computation.

A tensor leaves the device while the forward goes on, and comes back before the backward needs it. Memory goes from one
stream to the other only where the stream that computes waits for a copy, so no block is held back until the allocator
has seen an event: what is on the device is the same however far the host is ahead.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAVING = 4
"""Tensors that may be on their way to the host: with one more, the computation waits for the first."""
COMING = 4
"""Tensors that are brought back ahead of the backward: most of what one operator saves, attention's six at most."""
SLAB_BYTES = 32 * 2**20
"""Of page-locked memory that is taken at once: a power of two, which PyTorch does not round up and uses again."""


class Saved:
    """One tensor for the backward: its bytes in the host's memory, and itself while it is on the device."""

    def __init__(self, tensor: Tensor, host: list[Tensor], copies: Copies) -> None:
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.host, self.copies = host, copies
        self.here: Tensor | None = tensor
        self.changed = self.used = False
        self.copied: torch.cuda.Event | None = None
        self.copied = copies.run(list(zip(host, split_bytes(tensor, host), strict=True)))
        self.version = tensor._version

    def leave(self) -> None:
        """Give the device's memory back: what is computed from now on comes after the copy."""
        if self.here is not None:
            self.settle()
            self.here = None

    def come(self, device: torch.device) -> None:
        """Begin to bring it back, if it is not there."""
        if self.here is None:
            self.here = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
            self.copied = self.copies.run(list(zip(split_bytes(self.here, self.host), self.host, strict=True)))
            self.version = self.here._version

    def take(self, device: torch.device) -> Tensor:
        """The tensor on the device. Raises RuntimeError where it was changed in place, as autograd does."""
        self.come(device)
        self.settle()
        tensor, self.here, self.used = self.here, None, True
        assert tensor is not None
        if self.changed:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.shape)} was saved for the backward and then changed in place: its "
                f"gradient cannot be computed; change a copy of it"
            )
        return tensor

    def settle(self) -> None:
        """Let what is computed from now on wait for the copy."""
        if self.copied is not None:
            self.copied.wait()
            self.copied = None
        self.changed |= self.here is not None and self.here._version != self.version

    def __del__(self) -> None:
        # Nobody waited for the copy, as after an error: the memory is kept until it is made.
        if self.copied is not None and self.here is not None and self.copies.stream is not None:
            self.here.record_stream(self.copies.stream)


class Copies:
    """Copies between a device and the host's memory, on CUDA on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Copy to the first of each pair from the second, after all that was computed so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self.stream.record_event() if self.stream is not None else None


class Offload:
    """What one forward saves, in the order in which it did."""

    def __init__(self, copies: Copies) -> None:
        self.copies, self.device = copies, copies.device
        self.leaving: deque[Saved] = deque()
        # Weakly: what autograd is done with is gone, with its memory.
        self.unused: list[weakref.ref[Saved]] = []
        self.slab: Tensor | None = None

    def pack(self, tensor: Tensor) -> Saved | Tensor:
        """Begin to copy a tensor to the host, unless it is a weight, a view of one or not the device's."""
        root = tensor._base if tensor._base is not None else tensor
        if isinstance(root, nn.Parameter) or tensor.numel() == 0 or tensor.device.type != self.device.type:
            return tensor
        if len(self.leaving) == LEAVING:
            self.leaving.popleft().leave()
        dense = tensor.detach() if is_dense(tensor) else tensor.clone()
        saved = Saved(dense, self.take_host(dense.nbytes), self.copies)
        self.leaving.append(saved)
        self.unused.append(weakref.ref(saved))
        return saved

    def unpack(self, packed: Saved | Tensor) -> Tensor:
        """The tensor on the device, those that were saved before it on their way."""
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.take(self.device)
        for saved in self.next_unused():
            saved.come(self.device)
        return tensor

    def next_unused(self) -> list[Saved]:
        """The last few that were saved of those that no backward has used yet."""
        while self.unused and ((last := self.unused[-1]()) is None or last.used):
            self.unused.pop()
        found: list[Saved] = []
        for reference in reversed(self.unused):
            saved = reference()
            if saved is not None and not saved.used:
                found.append(saved)
            if len(found) == COMING:
                break
        return found

    def take_host(self, nbytes: int) -> list[Tensor]:
        """So many bytes of the host's memory. Page-locked ones come from slabs, which tensors share."""
        if self.device.type != "cuda":
            return [empty_on_host(nbytes, pinned=False)]
        pieces = []
        while nbytes:
            if self.slab is None or not self.slab.numel():
                self.slab = empty_on_host(SLAB_BYTES, pinned=True)
            piece, self.slab = self.slab[:nbytes], self.slab[nbytes:]
            pieces.append(piece)
            nbytes -= len(piece)
        return pieces


@contextmanager
def keep_on_host(copies: Copies) -> Iterator[None]:
    """A context whose saved tensors wait on the host. What is left of them on the device at its end is first in the
    backward, and stays."""
    offload = Offload(copies)
    try:
        with saved_tensors_hooks(offload.pack, offload.unpack):
            yield
    finally:
        offload.leaving.clear()
        offload.slab = None


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie side by side, in any order of dimensions."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def split_bytes(tensor: Tensor, pieces: list[Tensor]) -> list[Tensor]:
    """A dense tensor's bytes as they lie in memory, in parts as large as these."""
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return list(flat.split([len(piece) for piece in pieces]))


def empty_on_host(nbytes: int, pinned: bool) -> Tensor:
    """Bytes of the host's memory."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
