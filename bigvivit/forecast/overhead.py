"""What takes device memory besides the program's tensors: constants, each with its source, where seen, and its doubt.

What lies outside PyTorch's allocator lowers the capacity it has. What lies inside (workspaces that libraries ask
PyTorch for) is allocated like a tensor and goes into the stream of events that the allocator model runs. Numbers
without a published measurement say so and have a wide range. Not counted: torch.compile, all-to-all, other programs.
"""

from __future__ import annotations

from dataclasses import dataclass

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.units import GiB, MiB, format_bytes

CUBLAS_WORKSPACE = 8_519_680  # CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8
CUBLAS_WORKSPACE_LARGE = 32 * MiB


@dataclass(frozen=True)
class Part:
    """One thing that takes memory, in bytes."""

    name: str
    low_bytes: int
    expected_bytes: int
    high_bytes: int
    source: str
    """What was read, and on which card it was seen."""
    inside: bool = False
    """Whether PyTorch's allocator serves it."""


@dataclass(frozen=True)
class Overhead:
    """All parts, for one device."""

    parts: tuple[Part, ...]

    def outside(self) -> tuple[int, int, int]:
        """Low, expected and high bytes that the allocator cannot have."""
        parts = [part for part in self.parts if not part.inside]
        return (
            sum(part.low_bytes for part in parts),
            sum(part.expected_bytes for part in parts),
            sum(part.high_bytes for part in parts),
        )

    def workspaces(self) -> tuple[int, int, int]:
        """Low, expected and high bytes that libraries allocate through PyTorch, for each thread that uses them."""
        parts = [part for part in self.parts if part.inside]
        return (
            sum(part.low_bytes for part in parts),
            sum(part.expected_bytes for part in parts),
            sum(part.high_bytes for part in parts),
        )

    def explain(self) -> list[str]:
        """One line per part, the most doubtful first: what the difference between low and high is made of."""
        return [
            f"{part.name}: {format_bytes(part.expected_bytes)} ({format_bytes(part.low_bytes)} to "
            f"{format_bytes(part.high_bytes)}), {'inside' if part.inside else 'outside'} the allocator; {part.source}"
            for part in sorted(self.parts, key=lambda part: part.low_bytes - part.high_bytes)
        ]


def forecast_overhead(
    accelerator: Accelerator, *, ranks: int = 1, communicators: int = 1, display: bool = False
) -> Overhead:
    """What one device of `ranks` loses, with `communicators` NCCL groups each, and a monitor or not.

    Raises ConfigError for counts below one.
    """
    for name, value in (("ranks", ranks), ("communicators", communicators)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    parts = [context(accelerator), cublas_workspace(accelerator), cudnn_workspace(accelerator)]
    if ranks > 1:
        parts.append(nccl(accelerator, communicators))
    if display:
        parts.append(
            Part(
                "display",
                86 * MiB,
                512 * MiB,
                GiB,
                "86 MiB on a GTX 1060 with a monitor (tromp/cuckoo#54), 800 MB for a 4k desktop on a GTX 1070 "
                "(martyr-deepin/deepin-wm#62), 1 GB (mlc-ai/mlc-llm#263); expected: no source, between them",
            )
        )
    return Overhead(tuple(parts))


def capacity(accelerator: Accelerator, overhead: Overhead) -> tuple[int, int, int]:
    """Bytes that PyTorch's allocator can have, in the worst, the expected and the best case. Raises ConfigError where
    nothing is left."""
    low, expected, high = overhead.outside()
    if high >= accelerator.memory_bytes:
        raise ConfigError(
            f"memory={format_bytes(accelerator.memory_bytes)} of {accelerator.name} may not even hold the "
            f"{format_bytes(high)} that driver and libraries take: give more"
        )
    return accelerator.memory_bytes - high, accelerator.memory_bytes - expected, accelerator.memory_bytes - low


def context(accelerator: Accelerator) -> Part:
    """The driver's state and the kernels loaded so far."""
    name, high = "CUDA context and loaded kernels", GiB
    measured = accelerator.measured
    if measured is not None and measured.context_bytes is not None:
        name = "process: imports and libraries" if accelerator.on_host else name
        return Part(name, *measured.context_bytes, measured.where)
    if accelerator.capability is None:
        source = "no published measurement was found for this accelerator's runtime: the range of CUDA's, from nothing"
        return Part("runtime and loaded kernels", 0, 400 * MiB, high, source)
    source = (
        "287,047,680 B after one tensor, kernels loaded as they are used (pytorch/pytorch#86509), about 300 MB "
        "(#107667) and 400 MB (#109888), cards not named; 1008 MB on a Titan V with all kernels loaded (#28394)"
    )
    if accelerator.capability >= 90:
        source += (
            "; on an H100 0.52 GiB (mlc-ai/pith-train, tools/memory_estimator), and here 518 MiB after one tensor, 758 "
            "to 762 MiB after training steps (bench/results/calibrate_nvidia-h100-80gb-hbm3_2026-11-26.json)"
        )
        return Part(name, 287_047_680, 762 * MiB, high, source)
    return Part(name, 287_047_680, 400 * MiB, high, source)


def cublas_workspace(accelerator: Accelerator) -> Part:
    """One for each thread that runs matrix products: the caller's, and autograd's where there is a backward."""
    name, where = "cuBLAS workspace, per thread", "aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize"
    capability, measured = accelerator.capability, accelerator.measured
    if measured is not None and measured.workspace_bytes is not None:
        size = measured.workspace_bytes
        return Part(name, size, size, size, measured.where, inside=True)
    if capability is None and accelerator.name.startswith("MI"):
        size = 128 * MiB if accelerator.name == "MI300X" else 32 * MiB
        return Part(name, 32 * MiB, size, 128 * MiB, f"hipBLAS: {where}, by architecture", inside=True)
    if capability is None:
        return Part(name, 0, CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_LARGE, "no source for this accelerator", inside=True)
    if capability < 90:
        seen = f"{where}; seen in traces of real GPUs and in discuss.pytorch.org/t/178671"
        return Part(name, CUBLAS_WORKSPACE, CUBLAS_WORKSPACE, CUBLAS_WORKSPACE, seen, inside=True)
    if capability < 100:
        return Part(name, CUBLAS_WORKSPACE_LARGE, CUBLAS_WORKSPACE_LARGE, CUBLAS_WORKSPACE_LARGE, where, inside=True)
    changed = f"{where}; Blackwell's was changed back and forth in 2026 (pytorch/pytorch#175344, #182669)"
    return Part(name, CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_LARGE, CUBLAS_WORKSPACE_LARGE, changed, inside=True)


def cudnn_workspace(accelerator: Accelerator) -> Part:
    """Convolutions ask PyTorch for scratch and give it back after the call."""
    name, measured = "cuDNN workspace, while a convolution runs", accelerator.measured
    if measured is not None and measured.scratch_bytes is not None:
        return Part(name, 0, 0, measured.scratch_bytes, f"given back after the call; {measured.where}", inside=True)
    source = (
        "the algorithm decides, and no source gives a number; a vision transformer has one convolution, its patches"
    )
    return Part(name, 0, 32 * MiB, 256 * MiB, source, inside=True)


def nccl(accelerator: Accelerator, communicators: int) -> Part:
    """Buffers of each communicator; they grow with its channels, and these with the link's speed."""
    source = (
        "4 MiB for each channel's buffer (NVIDIA/nccl#391, #1450), more channels on faster links (#986); with NVLink "
        "544 MB for two and 688 MB for four A100 (#964), 1.6 GB reported for one communicator (#864)"
    )
    high = int(1.6 * GiB)
    if accelerator.capability is None:
        sizes = (0, 390 * MiB, high)
        source = "collectives of this accelerator: no measurement found, NCCL's range from nothing"
    elif accelerator.link == "NVLink":
        sizes = (390 * MiB, 688 * MiB, high)
        source += "; low: 0.39 GiB for the first group of 32 H100 (mlc-ai/pith-train, tools/memory_estimator)"
    else:
        sizes = (32 * MiB, 256 * MiB, high)
        source += "; low and expected without NVLink: no measurement found, a few channels taken"
    low, expected, high = (size * communicators for size in sizes)
    return Part(f"collectives, {communicators} communicator{'s' * (communicators > 1)}", low, expected, high, source)
