"""What tests/memory/test_on_cuda.py asks of a process that sees CUDA devices: one function for each question."""

from __future__ import annotations

import gc
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from bigvivit import assemble
from bigvivit.forecast.virtual_gpu.inside import driver_bytes, hold_events, locked_bytes
from bigvivit.memory import placement
from bigvivit.memory.apply import apply_plan
from bigvivit.memory.engine import DdpEngine
from bigvivit.memory.measure import measure_free
from bigvivit.memory.offload import LEAVING, Copies, keep_on_host
from bigvivit.memory.plan import MemoryPlan
from bigvivit.memory.quantize import CODES, pack_weights
from bigvivit.model.weights import random_weights
from bigvivit.training.step import train_step
from bigvivit.trial import Trial, build_trial
from tests.memory.test_placement import PIXELS, Model
from tests.model.reference import DEMO


def frozen(device: torch.device, **plan: Any) -> Model:
    """A small frozen tower by this plan."""
    model = Model()
    with tempfile.TemporaryDirectory() as folder:
        apply_plan(
            model, MemoryPlan(**plan), frozen=True, fill=random_weights(DEMO, 0), device=device, scratch=Path(folder)
        )
    return model


def pass_in_inference_mode(placement: str) -> list[int]:
    """Shape of the vectors."""
    model = frozen(torch.device("cuda"), placement=placement)
    with torch.inference_mode():
        return list(model(PIXELS).shape)


def step_in(compute: str) -> float:
    """The gradient norm of a step whose tower computes in this type."""
    trial = Trial(stage=2, tower="vit-demo", frames=8, size=48, classes=5, plan=MemoryPlan(compute=compute))  # type: ignore[arg-type]
    engine, batch = build_trial(trial, torch.device("cuda", 0))
    return train_step(engine, [batch]).grad_norm


def pass_without_waiting(storage: str, placement: str) -> None:
    """PyTorch raises in this mode where the host waits for the device."""
    model = frozen(torch.device("cuda"), storage=storage, placement=placement)
    pixels = PIXELS.cuda()
    model(pixels)  # what is chosen once
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(pixels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_on_device_without_waiting() -> None:
    """A tensor of numbers of the host's, made on the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.tensor([1.0, 2.0], device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def page_locks() -> tuple[list[bool], int]:
    """Whether each layer in the host's memory is page-locked; bytes that PyTorch's own pinned memory grew by."""
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    model: Any = frozen(torch.device("cuda"), placement="cpu")
    model(PIXELS)
    after = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    return [buffer.is_pinned() for buffer in model.tower.placement.buffers], after - before


def land_from_disk() -> tuple[int, int, list[bool]]:
    """(bytes of the largest layer, most that was page-locked, whether the landing buffers are and still are when the
    tower is gone)."""
    model: Any = frozen(torch.device("cuda"), placement="disk")
    for _ in range(2):
        model(PIXELS)
    there = model.tower.placement
    largest, buffers = max(size for _, size in there.places), there.landings
    pinned = [buffer.is_pinned() for buffer in buffers]
    del model, there
    gc.collect()
    return largest, locked_bytes(), [all(pinned), any(buffer.is_pinned() for buffer in buffers)]


def read_in_turn() -> list[str]:
    """What the thread that fetches from disk does, in order: reads into one buffer or the other, waits for a copy."""
    model: Any = frozen(torch.device("cuda"), placement="disk")
    read, wait = placement.read_bytes, torch.cuda.Event.synchronize
    done: list[str] = []
    starts: list[int] = []

    def watch_read(file: int, offset: int, target: Tensor) -> Tensor:
        if target.data_ptr() not in starts:
            starts.append(target.data_ptr())
        done.append(f"read into {starts.index(target.data_ptr())}")
        return read(file, offset, target)

    def watch_wait(event: torch.cuda.Event) -> None:
        done.append("wait")
        wait(event)

    with patch.object(placement, "read_bytes", watch_read), patch.object(torch.cuda.Event, "synchronize", watch_wait):
        model(PIXELS)
    return done


def use_the_second() -> tuple[int, int]:
    """Bytes that the drivers of two GPUs gave to a process that works on the second."""
    device = torch.device("cuda", 1)
    torch.cuda.set_device(device)
    for where in ("cpu", "disk"):
        frozen(device, placement=where)(PIXELS)
    return driver_bytes(0), driver_bytes(1)


def free_of_half() -> tuple[float, float]:
    """Share of the device that is free, before and after this process is allowed a quarter of it."""
    device = torch.device("cuda")
    total = torch.cuda.mem_get_info()[1]
    before = measure_free(device) / total
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        return before, measure_free(device) / total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def where_clips_are_under_ddp() -> str:
    """The device of the clips that the model is given."""

    class Watcher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(3, 2), ""

        def forward(self, clips: Tensor) -> Tensor:
            self.seen = clips.device.type
            return self.layer(clips.to("cuda").float())

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    model = Watcher().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    engine = DdpEngine(model, optimizer, schedule, device=torch.device("cuda", 0), accumulate=1, clip_norm=1.0)
    engine.backward(engine(torch.zeros(4, 3, dtype=torch.uint8)).sum())
    engine.step()
    dist.destroy_process_group()
    return model.seen


def where_saved_tensors_return() -> list[str]:
    """Devices of a tensor of the device's and one of the host's, as the backward finds them."""
    found: list[str] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: Tensor, factor: Tensor) -> Tensor:
            context.save_for_backward(value, factor)
            return value * 2

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
            found.extend(tensor.device.type for tensor in context.saved_tensors)
            return gradient * 2, None

    value = torch.ones(4, device="cuda", requires_grad=True)
    with keep_on_host(Copies(torch.device("cuda"))):
        output = Double.apply(value, torch.ones(()))
    output.sum().backward()
    return found


def streams_of_copies() -> list[tuple[str, bool]]:
    """(operator, whether its stream is the one that computes) of a forward and a backward, in order."""
    found: list[tuple[str, bool]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            devices = [value.device.type for value in args if isinstance(value, Tensor)]
            if devices == ["cpu", "cuda"] or devices == ["cuda", "cpu"]:
                found.append((f"to {devices[0]}", torch.cuda.current_stream() == torch.cuda.default_stream()))
            elif func in (torch.ops.aten.exp.default, torch.ops.aten.mul.Tensor):
                found.append((str(func), torch.cuda.current_stream() == torch.cuda.default_stream()))
            return func(*args, **(kwargs or {}))

    value = torch.ones(4, device="cuda", requires_grad=True)
    with Watch():
        with keep_on_host(Copies(torch.device("cuda"))):
            output = value
            for _ in range(LEAVING + 2):
                output = output.exp()
        output.sum().backward()
    return found


def take_tensors_along(nbytes: int, count: int) -> tuple[int, int, int]:
    """Most that was taken on the device while a forward saved `count` tensors of so many bytes and while its backward
    ran, in tensors, where no event completes; bytes that were page-locked."""
    value = torch.ones(nbytes, dtype=torch.uint8, device="cuda").view(torch.float32).requires_grad_()
    peaks = []
    hold_events(True)
    try:
        with keep_on_host(Copies(torch.device("cuda"))):
            output = value
            for _ in range(count):
                output = output.exp()
        peaks.append(torch.cuda.memory_stats()["active_bytes.all.peak"])
        torch.cuda.reset_peak_memory_stats()
        output.backward(torch.ones_like(output))
        peaks.append(torch.cuda.memory_stats()["active_bytes.all.peak"])
    finally:
        hold_events(False)
    return peaks[0] // nbytes, peaks[1] // nbytes, locked_bytes()


def fail_with_copies_under_way() -> tuple[int, int]:
    """Tensors whose memory is not free after a forward that failed, before and after the device has done its copies."""
    size = 2**22
    value = torch.ones(size, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    taken = []
    hold_events(True)
    try:
        with suppress(ZeroDivisionError), keep_on_host(Copies(torch.device("cuda"))):
            output = value
            for _ in range(9):
                output = output.exp()
            del output
            raise ZeroDivisionError
        taken.append(torch.cuda.memory_stats()["active_bytes.all.current"] - before)
    finally:
        hold_events(False)
    torch.empty(2**20, device="cuda")  # the allocator looks at events when it is asked
    taken.append(torch.cuda.memory_stats()["active_bytes.all.current"] - before)
    return taken[0] // (4 * size), taken[1] // (4 * size)


def where_codes_are_made() -> list[str]:
    """The devices of nf4's and of int8's codes of layers that are to compute on the GPU, before they are stored."""
    from bigvivit.memory import stream

    seen: dict[str, None] = {}

    def watch(module: nn.Module, storage: Any) -> dict[str, Tensor]:
        stored = pack_weights(module, storage)
        codes = [tensor for name, tensor in stored.items() if name.endswith(CODES)]
        seen.update((f"{storage} on {tensor.device.type}", None) for tensor in codes)
        return stored

    original, stream.pack_weights = stream.pack_weights, watch
    try:
        for storage in ("nf4", "int8"):
            frozen(torch.device("cuda"), storage=storage)
    finally:
        stream.pack_weights = original
    return list(seen)


def precisions() -> list[str]:
    """How fp32 products are computed: as chosen by default, and with tf32."""
    found = []
    for tf32 in (False, True):
        assemble.choose_device("cuda", tf32=tf32)
        found += [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]  # type: ignore[attr-defined]
    return found
