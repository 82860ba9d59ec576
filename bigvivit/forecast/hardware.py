"""Accelerators by name, by hand, and on this machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import ACCELERATORS, Accelerator, kernels_of


def normalise(name: str) -> str:
    """Lower case, without makers' and product lines' names, spaces and dashes: `NVIDIA RTX 2080 Ti` → `2080ti`."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    dropped = {"nvidia", "geforce", "tesla", "quadro", "rtx", "amd", "instinct", "radeon", "google", "cloud"}
    return re.sub(r"^(?:rtx)?", "", "".join(word for word in words if word not in dropped)).replace("gib", "gb")


def find_accelerator(name: str) -> Accelerator:
    """The row of a name, leniently written. Raises ConfigError for what is not in the table, or is several rows."""
    wanted = normalise(name)
    for row in ACCELERATORS:
        if wanted and wanted in (normalise(row.name), *row.aliases):
            return row
    sizes = [row.name for row in ACCELERATORS if row.name.endswith("GB") and normalise(row.name.split()[0]) == wanted]
    if sizes:
        raise ConfigError(f"hardware={name!r} is {' and '.join(sizes)}: say which")
    known = ", ".join(row.name for row in ACCELERATORS)
    raise ConfigError(
        f"hardware={name!r} is not in the table ({known}): give its memory, such as 24GiB, and the number of ranks by "
        "hand"
    )


def accelerator_by_hand(memory_bytes: int, capability: int | None = None) -> Accelerator:
    """A device of which only the memory is known: nothing can be said of its speed.

    Its attention is taken for that of CUDA devices since capability 5.0, where nothing says otherwise."""
    if memory_bytes <= 0:
        raise ConfigError(f"memory={memory_bytes} must be above 0 bytes")
    return Accelerator(
        name="given by hand",
        memory_bytes=memory_bytes,
        memory_source="given by hand",
        bandwidth=None,
        rates={},
        capability=capability,
        kernels=kernels_of(50 if capability is None else capability),
        link="unknown",
        link_bandwidth=None,
        host_bandwidth=None,
        source="given by hand",
    )


@dataclass(frozen=True)
class LocalGpu:
    """A GPU of this machine, by NVML."""

    index: int
    uuid: str
    """Of the card: CUDA's own order of devices may be another than NVML's, which goes by bus."""
    name: str
    memory_bytes: int
    """NVML's total, which counts what the driver keeps for itself: a little above what programs can have."""
    free_bytes: int
    """Not taken by other programs, a display, or the driver."""
    accelerator: Accelerator
    """Its row, with the memory that is free now; for a card not in the table, its memory alone."""


def find_local_gpus() -> list[LocalGpu]:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves to programs; raises ConfigError where there are none, or NVML or
    the driver is missing."""
    try:
        import pynvml
    except ImportError:
        raise ConfigError("local GPUs are found through NVML: pip install nvidia-ml-py, or name the hardware") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise ConfigError(f"no NVIDIA driver answers on this machine ({error}): name the hardware instead") from None
    gpus = []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        uuids = [as_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        for index in choose_visible(uuids):
            handle = handles[index]
            name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = as_text(name)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            total, free = int(memory.total), int(memory.free)
            try:
                row = find_accelerator(name)
                row = replace(row, memory_bytes=min(free, row.memory_bytes), memory_source="free now, by NVML")
            except ConfigError:
                row = replace(
                    accelerator_by_hand(free, 10 * major + minor), name=name, memory_source="free now, by NVML"
                )
            gpus.append(LocalGpu(index, uuids[index], name, total, free, row))
    except pynvml.NVMLError as error:
        raise ConfigError(f"NVML cannot describe GPU {len(gpus)} ({error}): name the hardware instead") from None
    finally:
        pynvml.nvmlShutdown()
    return gpus


def as_text(answer: str | bytes) -> str:
    """NVML's older bindings answer in bytes."""
    return answer.decode() if isinstance(answer, bytes) else answer


def choose_visible(uuids: list[str]) -> list[int]:
    """Places, in a machine of these GPUs by bus, of those that CUDA shows to programs, in its order.

    Raises ConfigError where it shows none, or parts of them.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(range(len(uuids)))
    places = []
    for word in filter(None, (word.strip() for word in named.split(","))):
        if word.startswith("MIG"):
            raise ConfigError(f"CUDA_VISIBLE_DEVICES={named} names a part of a GPU: give its memory by hand instead")
        found = [index for index, uuid in enumerate(uuids) if word == str(index) or uuid.startswith(word)]
        if not found:
            break  # CUDA too reads no further
        places += found
    if not places:
        raise ConfigError(f"CUDA_VISIBLE_DEVICES={named} shows programs no GPU: change it, or name the hardware")
    return places
