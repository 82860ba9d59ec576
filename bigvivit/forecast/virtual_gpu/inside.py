"""Inside a process that runs on virtual GPUs: whether it does, and what only the library knows."""

from __future__ import annotations

import ctypes
import os
import sys
import time

VARIABLE = "BIGVIVIT_VIRTUAL_GPU"
"""Describes the cards to the library; set in every process on virtual GPUs."""

ESTIMATES = (
    "convolutions", "recurrent networks", "Fourier transforms", "dense solvers", "sparse products", "CTC losses"
)  # fmt: skip
"""What csrc/estimates.c counts, by its numbers."""


def library() -> ctypes.CDLL | None:
    """The preloaded library, None where there is none."""
    if VARIABLE not in os.environ:
        return None
    loaded = ctypes.CDLL(None)
    if not hasattr(loaded, "bigvivit_virtual_gpu_driver_peak"):
        return None
    loaded.bigvivit_virtual_gpu_driver_peak.restype = ctypes.c_size_t
    loaded.bigvivit_virtual_gpu_locked_peak.restype = ctypes.c_size_t
    loaded.bigvivit_virtual_gpu_launches.restype = ctypes.c_size_t
    loaded.bigvivit_virtual_gpu_estimates.restype = ctypes.c_size_t
    return loaded


def is_active() -> bool:
    """Whether this process runs on virtual GPUs."""
    return library() is not None


def active_library() -> ctypes.CDLL:
    """The preloaded library. Raises RuntimeError where there is none."""
    loaded = library()
    if loaded is None:
        raise RuntimeError("this process does not run on virtual GPUs: start it with virtual_gpu.environment")
    return loaded


def driver_bytes(device: int = 0) -> int:
    """The most bytes that the driver of a virtual GPU had handed out to this process at once: contexts, PyTorch's
    segments and what was allocated past PyTorch. Raises RuntimeError where the process is on none."""
    return int(active_library().bigvivit_virtual_gpu_driver_peak(int(device)))


def locked_bytes() -> int:
    """The most bytes of the host's memory that this process had page-locked at once, by PyTorch or by itself."""
    return int(active_library().bigvivit_virtual_gpu_locked_peak())


def launches() -> int:
    """How many kernels this process has launched, without those inside cuBLAS, cuDNN and NCCL."""
    return int(active_library().bigvivit_virtual_gpu_launches())


def estimates() -> dict[str, int]:
    """How often NVIDIA's libraries were called in this process where their scratch is an estimate, by `ESTIMATES`
    (docs/virtual_gpu.md)."""
    count = active_library().bigvivit_virtual_gpu_estimates
    return {name: int(count(number)) for number, name in enumerate(ESTIMATES)}


def hold_events(hold: bool) -> None:
    """While held, no event completes when it is asked: blocks that other streams still use stay taken, as where the
    host runs far ahead of a device. Waiting for an event still returns."""
    active_library().bigvivit_virtual_gpu_hold_events(int(hold))


WATCHDOG_S = 0.25
"""PyTorch's watchdog of NCCL looks every 0.1 s for collectives that are done."""


def let_collectives_go() -> None:
    """Wait until PyTorch has let go of what the collectives of a step used, after which it looks now and then: a step
    takes longer than that on a GPU and less here, and buffers that are gone there would be counted here."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1:
        time.sleep(WATCHDOG_S)


def be_alone() -> None:
    """From now on this process's NCCL groups have no other processes to wait for: each other rank gives what this one
    gives. `alone.start_alone` starts torch.distributed so."""
    active_library().bigvivit_virtual_gpu_be_alone()
