"""What the tests run in child processes on virtual GPUs. Importing this imports no torch."""

from __future__ import annotations

import os
from typing import Any

MiB = 1024**2


def describe_card() -> dict[str, Any]:
    import torch

    from bigvivit.forecast import virtual_gpu

    properties = torch.cuda.get_device_properties(0)
    return {
        "active": virtual_gpu.is_active(),
        "count": torch.cuda.device_count(),
        "name": torch.cuda.get_device_name(0),
        "capability": torch.cuda.get_device_capability(0),
        "total": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2": properties.L2_cache_size,
        "shared": properties.shared_memory_per_block_optin,
        "threads": properties.max_threads_per_multi_processor,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "free": torch.cuda.mem_get_info(1),
    }


def describe_nvml() -> dict[str, Any]:
    import pynvml
    import torch

    pynvml.nvmlInit()
    torch.cuda.init()
    handle = pynvml.nvmlDeviceGetHandleByIndex(1)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "count": pynvml.nvmlDeviceGetCount(),
        "name": pynvml.nvmlDeviceGetName(handle),
        "capability": pynvml.nvmlDeviceGetCudaComputeCapability(handle),
        "free": memory.free,
        "driver": torch.cuda.mem_get_info(1)[0],
        "uuid": pynvml.nvmlDeviceGetUUID(handle) == f"GPU-{torch.cuda.get_device_properties(1).uuid}",
    }


def visible_devices(visible: str) -> int:
    import subprocess
    import sys

    code = "import torch; print(torch.cuda.device_count())"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    return int(subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True).stdout)


def run_out_of_memory() -> tuple[int, str, int]:
    """How many tensors of 1 GiB fit, PyTorch's message, and what the driver handed out at most."""
    import torch

    from bigvivit.forecast import virtual_gpu

    tensors: list[Any] = []
    try:
        while True:
            tensors.append(torch.empty(1024 * MiB, dtype=torch.uint8, device="cuda"))
    except torch.cuda.OutOfMemoryError as error:
        return len(tensors), str(error), virtual_gpu.driver_bytes(0)


def use_both_devices() -> list[tuple[int, int]]:
    """(allocated, driver's peak) per device, after a tensor on the second was copied to the first."""
    import torch

    from bigvivit.forecast import virtual_gpu

    torch.cuda.empty_cache()
    before = [torch.cuda.memory_allocated(index) for index in (0, 1)]
    there = torch.ones(MiB, device="cuda:1")
    here = there.to("cuda:0")
    assert here.device.index == 0
    changes = [torch.cuda.memory_allocated(index) - before[index] for index in (0, 1)]
    return [(change, virtual_gpu.driver_bytes(index)) for index, change in enumerate(changes)]


def read_values() -> dict[str, Any]:
    """What is read back, of each kind of value."""
    import torch

    device = "cuda"
    ids = torch.tensor([[5, 1, 0], [7, 1, 1]]).to(device)
    loss = torch.randn(64, device=device).square().mean()
    scaler = torch.amp.GradScaler("cuda")
    weight = torch.nn.Parameter(torch.randn(4, device=device))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler.scale((weight * 2).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    return {
        "uploaded": ids.tolist(),
        "copied": ids.clone()[1].tolist(),
        "filled": torch.full((2,), 2.5, device=device).tolist(),
        "random": torch.randn(2, device=device).tolist(),
        "loss": loss.item(),
        "isfinite": bool(torch.isfinite(loss).all()),
        "isfinite alone": bool(torch.isfinite(loss)),
        "isnan": bool(torch.isnan(loss)),
        "isnan any": bool(torch.isnan(loss).any()),
        "below a threshold": bool(loss < 0.01),
        "mask of padding": bool((ids != 0).all()),
        "mask without": bool((ids != 9).all()),
        "nonzero of a known mask": (ids == 1).nonzero().shape[0],
        "nonzero of an unknown one": (torch.randn(10, device=device) > 0).nonzero().shape[0],
        "sum of integers": ids.sum().item(),
        "concatenated": torch.cat([torch.arange(2 * i, 2 * i + 2).to(device) for i in range(4)]).tolist(),
        "size by an index": torch.zeros(int(ids.max().int() + 1)).shape[0],
        "cast and cast back": ids.int().long().tolist(),
        "mask on the host": (torch.randn(2, 3, device=device) > 0).int().bool().tolist(),
        "distinct": [found.shape[0] for found in torch.randn(10, device=device).unique(return_counts=True)],
        "counted most": torch.randn(10, device=device).unique(return_counts=True)[1].max().item(),
        "NaN taken": weight[torch.isnan(weight)].shape[0],
        "distribution": torch.distributions.Normal(loss.view(1), loss.exp().view(1)).batch_shape[0],
        "scale": scaler.get_scale(),
    }


def generation_ends(finished: bool) -> bool:
    """How transformers' generation sees whether all sequences are finished: by length, or by a token not known."""
    import torch

    device = "cuda"
    unfinished = torch.ones(2, dtype=torch.long, device=device)
    at_length = torch.full((2,), finished, dtype=torch.bool, device=device)
    ended = torch.isin(torch.randint(0, 9, (2,), device=device), torch.tensor([7], device=device))
    unfinished = unfinished & ~(at_length | ended)
    return bool(unfinished.max() == 0)


def reuse_memory() -> float:
    """What a fresh tensor reads as where an uploaded one was."""
    import torch

    uploaded = torch.tensor(3.5).cuda()
    address = uploaded.data_ptr()
    del uploaded
    fresh = torch.empty((), device="cuda")
    assert fresh.data_ptr() == address
    return fresh.item()


def attention_kernels(dtype: str) -> list[str]:
    """Operators of a self-attention, forward and backward."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    query = torch.randn(1, 2, 64, 64, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
    with torch.autograd.profiler.profile() as profile:
        scaled_dot_product_attention(query, query, query).sum().backward()
    return sorted(event.key for event in profile.key_averages() if "attention" in event.key)


def workspace_bytes() -> list[int]:
    """Allocations that the first matrix product makes, apart from its result."""
    import torch

    left = torch.ones(64, 64, device="cuda", dtype=torch.float16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    product = left @ left
    return [torch.cuda.memory_allocated() - before - product.numel() * product.element_size()]


def vit_step() -> dict[str, int]:
    """A training step of a small ViT in bf16 autocast: the first with nothing there, peak and what stays."""
    import torch
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128, num_classes=10).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    images = torch.randn(4, 3, 32, 32).cuda()
    parameters = sum(-(-4 * p.numel() // 512) * 512 for p in model.parameters())
    building = torch.cuda.memory_allocated()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(images).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    del loss
    return {
        "parameters": parameters,
        "images": images.numel() * 4,
        "building": building,
        "after": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
    }


def convolve() -> tuple[int, int]:
    """Bytes asked for of a patch convolution's result, and by how much the peak rose beyond what stayed."""
    import torch

    patches = torch.nn.Conv2d(3, 768, 16, 16).cuda().half()
    images = torch.randn(8, 3, 224, 224).cuda().half()
    torch.cuda.synchronize()
    key = "requested_bytes.all"
    before = torch.cuda.memory_stats()[f"{key}.current"]
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        result = patches(images)
    after = torch.cuda.memory_stats()
    assert result.is_cuda
    return after[f"{key}.current"] - before, after[f"{key}.peak"] - after[f"{key}.current"]


def compile_kernels() -> list[tuple[int, ...]]:
    """Results of kernels that PyTorch compiles by NVRTC when they are first called."""
    import torch

    values = torch.randn(4, 5, device="cuda")
    return [tuple(result.shape) for result in (values.prod(1), torch.special.erfcx(values), values.cfloat().sigmoid())]


def capture_graph() -> tuple[int, str]:
    """Kernels launched while a captured graph is replayed, and the error of reading a value during a capture."""
    import torch

    from bigvivit.forecast import virtual_gpu

    layer, data = torch.nn.Linear(8, 8).cuda(), torch.ones(8, 8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(data)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layer(data)
    before = virtual_gpu.launches()
    graph.replay()
    launched = virtual_gpu.launches() - before
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            result.sum().item()
    except RuntimeError as error:
        return launched, str(error)
    return launched, ""


def defer_frees() -> list[int]:
    """Bytes reserved for a second tensor while another stream still uses the freed first, and once it is done."""
    import torch

    from bigvivit.forecast import virtual_gpu

    stream, reserved = torch.cuda.Stream(), []
    for hold in (True, False):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        virtual_gpu.hold_events(hold)
        first = torch.empty(30 * MiB, dtype=torch.uint8, device="cuda")
        first.record_stream(stream)
        del first
        second = torch.empty(30 * MiB, dtype=torch.uint8, device="cuda")
        reserved.append(torch.cuda.memory_reserved() - before)
        virtual_gpu.hold_events(False)
        del second
    return reserved


def snapshot_kinds() -> set[str]:
    import torch

    torch.cuda.memory._record_memory_history()
    tensor = torch.ones(MiB, device="cuda")
    del tensor
    kinds = {event["action"] for event in torch.cuda.memory._snapshot()["device_traces"][0]}
    torch.cuda.memory._record_memory_history(enabled=None)
    return kinds


def caches_of_compilers() -> list[str]:
    """Where inductor and Triton keep what they made."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    return [cache_dir(), triton_cache_dir(0)]


def needs_sparselt() -> None:
    import torch

    torch._cslt_compress(torch.zeros(64, 64, device="cuda", dtype=torch.float16))


def fails() -> None:
    print("said before")
    raise ZeroDivisionError("as it must")


def says(text: str) -> str:
    import sys

    print(text, file=sys.stderr)
    return text.upper()


def ends() -> None:
    import sys

    print("last words", file=sys.stderr, flush=True)
    os._exit(3)


def offload_to_pinned_memory() -> tuple[int, float, int]:
    """(resident bytes that 256 MiB took which came from the device, their sum, page-locked bytes)."""
    import psutil
    import torch

    from bigvivit.forecast.virtual_gpu.inside import locked_bytes

    resident = psutil.Process().memory_info
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    before = resident().rss
    host[: 2**20] = 1  # of which nothing is left
    host.copy_(torch.ones(2**28, dtype=torch.uint8, device="cuda") * 2)
    return resident().rss - before, float(host[:: 2**12].sum()), locked_bytes()


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def shard_alone(rank: int, world: int) -> tuple[int, int]:
    """(bytes that one rank of `world` keeps of a sharded layer, those of the layer)."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from bigvivit.forecast.virtual_gpu.alone import start_alone

    start_alone(rank, world)
    before = torch.cuda.memory_allocated()
    layer = torch.nn.Linear(4096, 4096, bias=False, device="cuda")
    whole = torch.cuda.memory_allocated() - before
    fully_shard(layer)
    layer(torch.ones(8, 4096, device="cuda")).sum().backward()
    layer.zero_grad()
    torch.cuda.synchronize()
    kept = sum(parameter.to_local().untyped_storage().nbytes() for parameter in layer.parameters())
    dist.destroy_process_group()
    return kept, whole


def train_alone(engine: str, rank: int, world: int) -> tuple[int, list[object], int]:
    """(peak of two steps, what everybody says, their sum) where this rank is the only one that runs."""
    import torch
    import torch.distributed as dist

    from bigvivit.forecast.virtual_gpu.alone import start_alone
    from tests.forecast.virtual_gpu import rank as program

    start_alone(rank, world)
    objects: list[object] = [None] * world
    dist.all_gather_object(objects, rank)
    dist.barrier()
    count = torch.tensor([1], device="cuda")
    dist.all_reduce(count)
    torch.cuda.reset_peak_memory_stats()
    program.train(engine, 0)
    dist.barrier()
    return torch.cuda.max_memory_allocated(), objects, int(count.item())
