"""Where the layers of a frozen tower live when it is not on the device: fetched one ahead of the one that computes.

A placement allocates on the caller's thread, and only the copy runs elsewhere: who counts allocations sees them all.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: every tensor in a buffer begins where any type may begin, and vector units like to read."""


@dataclass(frozen=True)
class Slot:
    """One tensor's place in a layer's buffer."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    offset: int
    nbytes: int


def plan_slots(tensors: Mapping[str, Tensor]) -> tuple[list[Slot], int]:
    """Places for these tensors one after the other, and the bytes they take together."""
    slots, end = [], 0
    for name, tensor in tensors.items():
        slots.append(Slot(name, tensor.dtype, tensor.shape, end, tensor.nbytes))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return slots, end


def view_slots(buffer: Tensor, slots: list[Slot]) -> dict[str, Tensor]:
    """The tensors in a buffer of bytes, as views of it."""
    return {
        slot.name: buffer[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape) for slot in slots
    }


class Fetch(Protocol):
    """A layer on its way."""

    def wait(self) -> Tensor:
        """Its bytes, uint8 on the device."""
        ...


class Placement(Protocol):
    """Keeps the bytes of layers, by number."""

    fetches: int
    """Layers fetched so far."""

    def store(self, buffer: Tensor) -> int:
        """Keep a layer's bytes, uint8 on the CPU. Returns its number."""
        ...

    def fetch(self, number: int) -> Fetch:
        """Begin to bring a layer to the device."""
        ...


@dataclass(frozen=True)
class Here:
    """A layer that need not be waited for."""

    buffer: Tensor

    def wait(self) -> Tensor:
        return self.buffer


class DevicePlacement:
    """Layers stay on the device, in their stored form."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.fetches = device, 0
        self.buffers: list[Tensor] = []

    def store(self, buffer: Tensor) -> int:
        self.buffers.append(buffer.to(self.device))
        return len(self.buffers) - 1

    def fetch(self, number: int) -> Fetch:
        self.fetches += 1
        return Here(self.buffers[number])


class CpuPlacement:
    """Layers in the host's memory, page-locked where the device is CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.fetches = device, 0
        self.mover = Mover(device)
        self.buffers: list[Tensor] = []

    def store(self, buffer: Tensor) -> int:
        if self.device.type == "cuda":
            lock_while(self, self.mover, buffer)
        self.buffers.append(to_host(buffer))
        return len(self.buffers) - 1

    def fetch(self, number: int) -> Fetch:
        self.fetches += 1
        source = self.buffers[number]
        target = torch.empty(source.numel(), dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda":
            return self.mover.start(lambda landing: landing, source, target)
        return self.mover.start(partial(copy_bytes, source), target, target)


class DiskPlacement:
    """Layers in a file, read into buffers of our own: they count as what they are, and no page of a map lingers.

    The file is written while the tower is loaded, in the form that is to be stored, and is gone when the process ends.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device, self.fetches = device, 0
        self.mover = Mover(device)
        folder.mkdir(parents=True, exist_ok=True)
        # Without a name where the file system can: nothing is left behind however the process ends.
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (open as long as the tower is)
        self.places: list[tuple[int, int]] = []
        self.landings: list[Tensor] = []
        self.leaving: list[Future[torch.cuda.Event | None] | None] = [None, None]

    def store(self, buffer: Tensor) -> int:
        offset = sum(self.places[-1]) if self.places else 0
        write_bytes(self.file.fileno(), offset, buffer)
        self.places.append((offset, len(buffer)))
        return len(self.places) - 1

    def fetch(self, number: int) -> Fetch:
        self.fetches += 1
        offset, size = self.places[number]
        read = partial(read_bytes, self.file.fileno(), offset)
        if self.device.type != "cuda":
            landing = torch.empty(size, dtype=torch.uint8)
            return self.mover.start(read, landing, landing)
        if not self.landings:
            self.landings = self.lock_landings()
        turn = self.fetches % 2
        target = torch.empty(size, dtype=torch.uint8, device=self.device)
        fetch = self.mover.start(partial(fill_anew, self.leaving[turn], read), self.landings[turn][:size], target)
        self.leaving[turn] = fetch.done
        return fetch

    def lock_landings(self) -> list[Tensor]:
        """Page-locked room for two of the largest layer: one is read while the one before it goes to the device."""
        room = torch.empty(2, max(size for _, size in self.places), dtype=torch.uint8)
        lock_while(self, self.mover, room)
        return list(room)


class Mover:
    """Copies in the background: one thread, which only copies, and on CUDA a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda" and device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A thread begins on the first GPU, whichever this rank has, and would leave a context there.
        chosen = partial(torch.cuda.set_device, self.device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="bigvivit-fetch", initializer=chosen)

    def start(self, fill: Callable[[Tensor], Tensor], landing: Tensor, target: Tensor) -> Moving:
        """`fill(landing)` gives bytes in the host's memory; they end up in `target`, which may be the same."""
        if self.stream is not None:
            # What the target's memory was used for before may still be running.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return Moving(self.thread.submit(self.run, fill, landing, target), target)

    def run(self, fill: Callable[[Tensor], Tensor], landing: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """In the other thread."""
        source = fill(landing)
        if self.stream is None:
            return None
        # Modes are each thread's own: a target that was made for inference can only be written to in that mode.
        with torch.inference_mode(target.is_inference()), torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()


@dataclass(frozen=True)
class Moving:
    """A copy that is under way."""

    done: Future[torch.cuda.Event | None]
    target: Tensor

    def wait(self) -> Tensor:
        event = self.done.result()
        if event is not None:
            event.wait()  # the main stream waits, not this thread
        return self.target


def to_host(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, where it waits for the device."""
    return tensor


def lock_pages(buffer: Tensor) -> None:
    """Page-lock memory that is there already. (PyTorch's `pin_memory` copies to a block of the next power of two: 2.5
    GiB for the 1.9 of ViT-g in bf16.)"""
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))


def unlock_pages(stream: torch.cuda.Stream, buffer: Tensor) -> None:
    """Undo `lock_pages`, before the memory goes back and after the copies of this stream."""
    stream.synchronize()
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def lock_while(owner: object, mover: Mover, buffer: Tensor) -> None:
    """Page-lock memory as long as `owner` is there, whose copies `mover` makes."""
    assert mover.stream is not None
    lock_pages(buffer)
    weakref.finalize(owner, unlock_pages, mover.stream, buffer)


def write_bytes(file: int, offset: int, source: Tensor) -> None:
    """All of `source` to this place in the file."""
    view = memoryview(source.numpy())  # type: ignore[arg-type]
    written = 0
    while written < len(view):
        written += os.pwrite(file, view[written:], offset + written)


def copy_bytes(source: Tensor, target: Tensor) -> Tensor:
    """NumPy's copy lets other threads run meanwhile and takes none of PyTorch's."""
    target.numpy()[:] = source.numpy()
    return target


def fill_anew(
    last: Future[torch.cuda.Event | None] | None, fill: Callable[[Tensor], Tensor], landing: Tensor
) -> Tensor:
    """`fill(landing)`, once the copy to the device of what it held last is made. In the other thread."""
    if last is not None and last.exception() is None and (event := last.result()) is not None:
        event.synchronize()
    return fill(landing)


def read_bytes(file: int, offset: int, target: Tensor) -> Tensor:
    """All of `target` from this place in the file."""
    view = memoryview(target.numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise OSError("the file of the tower's layers has become shorter")
        done += count
    return target


def build_placement(where: str, device: torch.device, folder: Path) -> Placement:
    """`device`, `cpu` or `disk`; `folder` is where the last one puts its file."""
    if where == "disk":
        return DiskPlacement(device, folder)
    return CpuPlacement(device) if where == "cpu" else DevicePlacement(device)
