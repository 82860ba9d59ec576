"""The table of accelerators: what a forecast must know of hardware that is not here.

Every number is of one device as PyTorch sees it: one graphics card, one die of an MI250X, one core of a TPU. Rates are
dense (no structured sparsity), of matrix products that accumulate in fp32, in operations per second; a type without an
entry has no units for it. Bandwidths are bytes per second; of links in one direction. What was read where stands in
each row; what no source gave is None, what was derived says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bigvivit.units import GiB, MiB

Rate = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
Kernel = Literal["flash", "memory_efficient", "math"]
TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True)
class CudaDevice:
    """What CUDA says of an NVIDIA card, beyond what its compute capability fixes."""

    name: str
    """As `torch.cuda.get_device_name` gives it."""
    multiprocessors: int
    l2_bytes: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What `bigvivit calibrate` measured on a card, in place of constants; None where it did not."""

    where: str
    """`measured on this card on 2026-11-26 (driver 580.65, torch 2.14.1)`."""
    context_bytes: tuple[int, int, int] | None = None
    """Least, expected and most."""
    workspace_bytes: int | None = None
    scratch_bytes: int | None = None
    rates: dict[str, float] = field(default_factory=dict)
    """As reached by products of large matrices, not as the maker gives them."""
    host_bandwidth: float | None = None
    """As reached from page-locked memory."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One row."""

    name: str
    aliases: tuple[str, ...] = ()
    """Other names, in the form that `normalise` gives."""
    memory_bytes: int
    """What the driver lets programs have, all programs together (the total of `cudaMemGetInfo`)."""
    memory_source: str
    bandwidth: float | None
    """Of its memory."""
    rates: dict[Rate, float]
    capability: int | None
    """CUDA compute capability, 80 for 8.0; None on others."""
    kernels: tuple[Kernel, ...]
    """What `scaled_dot_product_attention` can choose from; flash in fp16 and bf16 only."""
    link: str
    """How devices of one machine talk to one another."""
    link_bandwidth: float | None
    host_bandwidth: float | None
    """To the processor's memory: the nominal rate of its PCIe generation, sixteen lanes."""
    source: str
    """Of bandwidth, rates and links."""
    device: CudaDevice | None = None
    """What a virtual GPU shows; None on others."""
    measured: Measured | None = None
    """Of rows that a calibration was found for."""
    on_host: bool = False
    """A processor: tensors are malloc's in the host's memory, and nothing is CUDA's."""


def kernels_of(capability: int | None) -> tuple[Kernel, ...]:
    """Attention kernels of a CUDA device: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of PyTorch,
    check_flash_attention_hardware_support (8.0 to 12.1) and check_mem_efficient_hardware_support (5.0 to 12.1)."""
    if capability is None:
        return ("math",)
    flash: tuple[Kernel, ...] = ("flash",) if 80 <= capability <= 121 else ()
    return (*flash, "memory_efficient", "math") if 50 <= capability <= 121 else ("math",)


def in_tera(rates: dict[Rate, float]) -> dict[Rate, float]:
    """Rates given in 10¹² operations per second."""
    return {key: value * TERA for key, value in rates.items()}


def nvidia(
    name: str,
    *aliases: str,
    gib: float,
    memory: str,
    capability: int,
    gb_per_second: float,
    tera: dict[Rate, float],
    pcie: Literal[3, 4, 5],
    source: str,
    device: CudaDevice,
    nvlink_gb_per_second: float | None = None,
) -> Accelerator:
    """A row of an NVIDIA card. PCIe cards talk through the host; bridges that one can buy are not counted."""
    host = {3: 16.0, 4: 32.0, 5: 64.0}[pcie] * GIGA
    return Accelerator(
        name=name,
        aliases=aliases,
        memory_bytes=int(gib * GiB),
        memory_source=memory,
        bandwidth=gb_per_second * GIGA,
        rates=in_tera(tera),
        capability=capability,
        kernels=kernels_of(capability),
        link="NVLink" if nvlink_gb_per_second else f"PCIe {pcie}",
        link_bandwidth=nvlink_gb_per_second * GIGA if nvlink_gb_per_second else host,
        host_bandwidth=host,
        source=source,
        device=device,
    )


def cuda(name: str, multiprocessors: int, l2_mib: float, source: str) -> CudaDevice:
    """What a CUDA program is told of a card: its name, multiprocessors and L2 cache in MiB, and where that was read."""
    return CudaDevice(name, multiprocessors, int(l2_mib * MiB), source)


PRINTED = "get_device_properties as printed in public files (exact-string search, files not identified)"
CORES = "cores ÷ 128 and L2 of NVIDIA's white paper on the architecture; no printed line was found"
SPECS = "github.com/winston-zhang-orz/gpu-specs, specs.md"
HOPPER: dict[Rate, float] = {"fp32": 66.9, "tf32": 494.7, "fp16": 989.4, "bf16": 989.4, "int8": 1978.9, "fp8": 1978.9}
AMPERE: dict[Rate, float] = {"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312, "int8": 624}
VOLTA: dict[Rate, float] = {"fp32": 15.7, "fp16": 125}
ACCELERATORS: tuple[Accelerator, ...] = (
    nvidia(
        "RTX 2080 Ti",
        gib=10.76,
        memory="out-of-memory message, JDAI-CV/image-captioning#11",
        capability=75,
        gb_per_second=616,
        tera={"fp32": 13.4, "fp16": 53.8, "int8": 215},
        pcie=3,
        source="bandwidth: 3dfxzone.it, news 28580; rates derived from 68 multiprocessors with 8 tensor cores each "
        "(vortez.net, ZOTAC RTX 2080 Ti AMP review) of 64 fused operations at 1.545 GHz, halved for fp32 accumulation",
        device=cuda(
            "NVIDIA GeForce RTX 2080 Ti",
            68,
            5.5,
            f"multiprocessors: {PRINTED}, where the name lacks NVIDIA; L2: NVIDIA's Turing white paper",
        ),
    ),
    nvidia(
        "RTX 3090",
        gib=23.70,
        memory="out-of-memory message, GaoLii/DSP#10",
        capability=86,
        gb_per_second=936,
        tera={"fp32": 35.6, "tf32": 35.6, "fp16": 71, "bf16": 71, "int8": 284},
        pcie=4,
        source="holynerdvana.blogspot.com, RTX 3090 specifications (fp16 142 with fp16 accumulation, halved here; int8 "
        "and tf32 derived: twice fp16 with fp16 accumulation, half of fp16)",
        device=cuda("NVIDIA GeForce RTX 3090", 82, 6, CORES),
    ),
    nvidia(
        "RTX 4090",
        gib=23.64,
        memory="out-of-memory message, 3DTopia/Phidias-Diffusion#8",
        capability=89,
        gb_per_second=1008,
        tera={"fp32": 82.6, "tf32": 82.6, "fp16": 165.2, "bf16": 165.2, "int8": 660.6, "fp8": 330.3},
        pcie=4,
        source=f"waredb.com, NVIDIA GeForce RTX 4090; hmc-tech.com, RTX 4090 against RTX PRO 5000; PCIe: {SPECS}",
        device=cuda("NVIDIA GeForce RTX 4090", 128, 72, CORES),
    ),
    nvidia(
        "RTX 5090",
        gib=31.37,
        memory="out-of-memory message, Wan-Video/Wan2.1#465",
        capability=120,
        gb_per_second=1792,
        tera={"fp32": 104.8, "tf32": 104.8, "fp16": 209.6, "bf16": 209.6, "int8": 838.4, "fp8": 419.2},
        pcie=5,
        source="spheron.network, RTX 5090 specs (fp16 838.4 with sparsity and fp16 accumulation: a quarter; fp8 "
        "likewise, int8 and tf32 derived). xzwgit/gpu-flops-bench measured more: bf16 254, tf32 126, fp8 774, int8 906",
        device=cuda("NVIDIA GeForce RTX 5090", 170, 96, CORES),
    ),
    nvidia(
        "T4",
        gib=14.56,
        memory="out-of-memory message, Zheng-Chong/CatVTON#133",
        capability=75,
        gb_per_second=300,
        tera={"fp32": 8.1, "fp16": 65, "int8": 130},
        pcie=3,
        source=f"{SPECS}; Lightning-AI/pytorch-lightning, fabric/utilities/throughput.py",
        device=cuda("Tesla T4", 40, 4, f"name, multiprocessors: {PRINTED}; L2: NVIDIA's Turing white paper"),
    ),
    nvidia(
        "V100 16GB",
        *("v100sxm216gb", "v100sxm2", "v100sxm16gb"),
        gib=15.78,
        memory="out-of-memory message, kchengiva/Shift-GCN#34",
        capability=70,
        gb_per_second=900,
        tera=VOLTA,
        pcie=3,
        nvlink_gb_per_second=150,
        source=f"SXM2: {SPECS}; Lightning-AI/pytorch-lightning, throughput.py; NVLink: manualshelf.com, Dell EMC Ready "
        "Solutions for AI, page 17",
        device=cuda("Tesla V100-SXM2-16GB", 80, 6, f"name, multiprocessors: {PRINTED}; L2: NVIDIA's Volta white paper"),
    ),
    nvidia(
        "V100 32GB",
        *("v100sxm232gb", "v100sxm332gb", "v100sxm32gb"),
        gib=31.74,
        memory="out-of-memory message, liucongg/ChatGLM-Finetuning#73",
        capability=70,
        gb_per_second=900,
        tera=VOLTA,
        pcie=3,
        nvlink_gb_per_second=150,
        source="as V100 16GB",
        device=cuda("Tesla V100-SXM2-32GB", 80, 6, "as V100 16GB"),
    ),
    nvidia(
        "A10",
        "a10pcie",
        gib=22.20,
        memory="out-of-memory message of an A10G, XavierXiao/Dreambooth-Stable-Diffusion#18; nvidia-smi says 23028 MiB "
        "for an A10, modal-labs/modal-client#2797",
        capability=86,
        gb_per_second=600,
        tera={"fp32": 31.2, "tf32": 62.5, "fp16": 125, "bf16": 125, "int8": 250},
        pcie=4,
        source=SPECS,
        device=cuda("NVIDIA A10", 72, 6, f"{CORES}; an A10G has 80"),
    ),
    nvidia(
        "L4",
        gib=22.03,
        memory="out-of-memory message, ArcInstitute/evo2#190",
        capability=89,
        gb_per_second=300,
        tera={"fp32": 30.3, "tf32": 60, "fp16": 121, "bf16": 121, "int8": 242, "fp8": 242},
        pcie=4,
        source=SPECS,
        device=cuda("NVIDIA L4", 58, 48, CORES),
    ),
    nvidia(
        "A100 40GB",
        *("a100sxm440gb", "a100sxm40gb"),
        gib=42298834944 / GiB,
        memory="deviceQuery, bottlerocket-os/bottlerocket#3873",
        capability=80,
        gb_per_second=1555,
        tera=AMPERE,
        pcie=4,
        nvlink_gb_per_second=300,
        source="SXM4: glennklockwood.com/garden/processors/A100",
        device=cuda(
            "NVIDIA A100-SXM4-40GB",
            108,
            40,
            f"multiprocessors: {PRINTED} of an A100-PCIE-40GB; L2: NVIDIA's Ampere white paper",
        ),
    ),
    nvidia(
        "A100 80GB",
        *("a100sxm480gb", "a100sxm80gb"),
        gib=79.17,
        memory="out-of-memory message, deepspeedai/DeepSpeed#2899; 79.25 in levihsu/OOTDiffusion#235, 79.35 elsewhere",
        capability=80,
        gb_per_second=2039,
        tera=AMPERE,
        pcie=4,
        nvlink_gb_per_second=300,
        source="SXM4: glennklockwood.com/garden/processors/A100",
        device=cuda(
            "NVIDIA A100-SXM4-80GB", 108, 40, f"name, multiprocessors: {PRINTED}; L2: NVIDIA's Ampere white paper"
        ),
    ),
    nvidia(
        "RTX A6000",
        gib=47.46,
        memory="no message that names the card was found: 47.46 is an RTX 8000's, Victarry/stable-dreambooth#8; "
        "messages of unnamed 48 GB cards say 47.50 to 47.54",
        capability=86,
        gb_per_second=768,
        tera={"fp32": 38.7, "tf32": 77.4, "fp16": 154.8, "bf16": 154.8, "int8": 309.7},
        pcie=4,
        source="llmperf.net, Nvidia-A6000-GPUs; fp32 and PCIe: sysrqmts.com, RTX A6000; tf32 derived: half of fp16",
        device=cuda("NVIDIA RTX A6000", 84, 6, f"name, multiprocessors: {PRINTED}; L2: NVIDIA's white paper on GA102"),
    ),
    nvidia(
        "L40S",
        gib=44.40,
        memory="out-of-memory message of an L40, QwenLM/Qwen3-VL#2097; nvidia-smi says 46068 MiB for an L40S, "
        "modal-labs/modal-client#2797",
        capability=89,
        gb_per_second=864,
        tera={"fp32": 91.6, "tf32": 183, "fp16": 362, "bf16": 362, "int8": 733, "fp8": 733},
        pcie=4,
        source=SPECS,
        device=cuda("NVIDIA L40S", 142, 96, f"name, multiprocessors: {PRINTED}; L2: NVIDIA's Ada white paper"),
    ),
    nvidia(
        "H100",
        *("h100sxm", "h100sxm5", "h10080gb", "h10080gbhbm3", "h100sxm80gb", "h100sxm580gb"),
        gib=79.178711,
        memory="85,017,493,504 B by driver 580.159.04, measured here; 79.11 GiB in vllm-project/vllm#27508",
        capability=90,
        gb_per_second=3350,
        tera=HOPPER,
        pcie=5,
        nvlink_gb_per_second=450,
        source="SXM5: glennklockwood.com/garden/processors/h100",
        device=cuda("NVIDIA H100 80GB HBM3", 132, 50, PRINTED),
    ),
    nvidia(
        "H200",
        *("h200sxm", "h200141gb", "h200sxm141gb"),
        gib=139.80,
        memory="out-of-memory messages in public files that name the card (exact-string search, files not identified)",
        capability=90,
        gb_per_second=4800,
        tera=HOPPER,
        pcie=5,
        nvlink_gb_per_second=450,
        source="SXM: meta-pytorch/tritonbench#78; NVLink: cyfuture.cloud; the rest as H100",
        device=cuda("NVIDIA H200", 132, 60, PRINTED),
    ),
    nvidia(
        "B200",
        *("b200sxm", "b200sxm6"),
        gib=178.35,
        memory="device query, pytorch/ao#4002",
        capability=100,
        gb_per_second=7672,
        tera={"fp32": 75, "tf32": 1130, "fp16": 2250, "bf16": 2250, "int8": 4500, "fp8": 4500},
        pcie=5,
        nvlink_gb_per_second=900,
        source="bandwidth: pytorch/ao#4002; rates: hmc-tech.com, B200 against MI300A; NVLink: intuitionlabs.ai, NVIDIA "
        "data center GPU specs; PCIe taken as H100's",
        device=cuda("NVIDIA B200", 148, 126, PRINTED),
    ),
    Accelerator(
        name="MI250X",
        aliases=("mi250xgcd",),
        memory_bytes=int(63.98 * GiB),
        memory_source="64 GiB per die, less the 0.02 that an MI355X's message lacks of its own, ROCm/TheRock#2118",
        bandwidth=1600 * GIGA,
        rates=in_tera({"fp32": 95.7 / 2, "fp16": 383.0 / 2, "bf16": 383.0 / 2, "int8": 383.0 / 2}),
        capability=None,
        kernels=("flash", "memory_efficient", "math"),
        link="Infinity Fabric",
        link_bandwidth=50 * GIGA,
        host_bandwidth=None,
        source="per die, half of the card: zexron.com, MI250X (fp32: matrix units); bandwidth and link (one of "
        "several): ROCm documentation, MI250 microarchitecture; kernels: AOTriton, sdp_utils.cpp (memory_efficient not "
        "checked)",
    ),
    Accelerator(
        name="MI300X",
        aliases=("mi300xoam",),
        memory_bytes=int(191.98 * GiB),
        memory_source="192 GiB, less the 0.02 that an MI355X's message lacks of its own, ROCm/TheRock#2118",
        bandwidth=5300 * GIGA,
        rates=in_tera({"fp32": 163.4, "tf32": 653.7, "fp16": 1307.4, "bf16": 1307.4, "int8": 2614.9, "fp8": 2614.9}),
        capability=None,
        kernels=("flash", "memory_efficient", "math"),
        link="Infinity Fabric",
        link_bandwidth=None,
        host_bandwidth=None,
        source="torch 2.14.1, torch/_inductor/analysis/device_info.py; kernels as MI250X; links: no source",
    ),
    Accelerator(
        name="TPU v3",
        aliases=("tpuv3core",),
        memory_bytes=16 * GiB,
        memory_source="half of the chip's 32 GiB, cloud.google.com/tpu/docs/v3; what its runtime keeps: no source",
        bandwidth=450 * GIGA,
        rates={"bf16": 61.5 * TERA},
        capability=None,
        kernels=("math",),
        link="2D torus",
        link_bandwidth=None,
        host_bandwidth=None,
        source="per core, half of the chip: cloud.google.com/tpu/docs/v3",
    ),
)
