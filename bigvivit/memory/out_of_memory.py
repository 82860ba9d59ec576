"""Running out of memory: telling it apart, letting go of what was held, and what was measured of it."""

from __future__ import annotations

import ctypes
import gc
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from bigvivit.memory.measure import Peak, measure_free, measure_holes, measure_limit, measure_peak

SAID = ("can't allocate memory", "out of memory", "Cannot allocate memory", "can't start new thread", "std::bad_alloc",
        "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED")  # fmt: skip
"""How PyTorch's CPU allocator, the C library, Python's threads, C++ and CUDA's libraries, which take memory of their
own, say it without an exception of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or the host; an error that was raised from such a one counts."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in SAID):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


LEAST_RESERVE = 1 / 3
"""Share of the room on the host that is left to holes between blocks, however few there were: smaller blocks, which
glibc keeps in heaps, leave more of them. 170 of 584 MiB were seen in a step whose blocks had 5 to 20 MiB."""


@dataclass(frozen=True)
class Shortage:
    """What was measured when memory ran out. Of the host's memory where the device is the CPU."""

    message: str
    """The allocator's own."""
    where: str
    """The innermost function of this package that ran."""
    held: Peak
    limit_bytes: int | None
    """RLIMIT_DATA; None without one, and on CUDA."""
    tensors_bytes: int
    """What went back when everything that belonged to the training was let go."""
    holes_bytes: int
    """What malloc had free between blocks, and could not use."""
    room_bytes: int
    """What can be had now: all that tensors, and holes between them, may take."""

    @property
    def usable_bytes(self) -> int:
        """The room less a reserve for holes: the share that they had, at least LEAST_RESERVE. On CUDA all of it."""
        if self.held.allocated_bytes is not None:
            return self.room_bytes
        share = self.holes_bytes / max(self.tensors_bytes + self.holes_bytes, 1)
        return int(self.room_bytes * (1 - max(share, LEAST_RESERVE)))


def measure_shortage(error: BaseException, device: torch.device) -> Shortage:
    """Read the counters, let go of all that the failed call held, and read what that gave back.

    The error loses its traceback: it holds the model. Callers must hold nothing of it either.
    """
    message = next(iter(str(error).strip().splitlines()), type(error).__name__)
    message = message[max(message.find("DefaultCPUAllocator"), 0) :]  # behind a line of its source
    where, held = find_place(error), measure_peak(device)
    on_host = device.type != "cuda"
    holes, before = (measure_holes() if on_host else 0), measure_room(device)
    let_go(error, device)
    room = measure_room(device)
    return Shortage(message, where, held, measure_limit() if on_host else None, room - before, holes, room)


def measure_room(device: torch.device) -> int:
    """What could still be had, on the host also of what malloc keeps."""
    return measure_free(device) + (measure_holes() if device.type != "cuda" else 0)


def find_place(error: BaseException) -> str:
    """`backward in memory/engine.py`; empty where none of our functions was running."""
    root = Path(__file__).resolve().parents[1]
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__) if root in Path(frame.filename).resolve().parents
    ]
    return f"{own[-1].name} in {Path(own[-1].filename).resolve().relative_to(root)}" if own else ""


def let_go(error: BaseException, device: torch.device) -> None:
    """Free what the frames of a failed call hold, and give it back to the system."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None
    gc.collect()  # engines hold themselves in circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
