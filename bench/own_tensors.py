"""Programs that take the same tensors on a CPU and on a GPU, for `bench/virtual_truth.py`: each is a function of a
device that gives one step as a function.

Left out is what the two do differently: convolutions, fused attention, autocast, dropout, foreach optimizers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bigvivit.memory.measure import count_cpu_allocations

Step = Callable[[], object]


def perceptron(width: int = 512, depth: int = 4) -> nn.Sequential:
    return nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(width, width), nn.GELU())])


def sgd(device: str) -> Step:
    model, x = perceptron().to(device), torch.zeros(2048, 512, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)

    def step() -> None:
        functional.mse_loss(model(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adamw(device: str) -> Step:
    model, x = perceptron().to(device), torch.zeros(256, 512, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def step() -> None:
        functional.cross_entropy(model(x), torch.zeros(256, dtype=torch.long, device=device)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def accumulation(device: str) -> Step:
    model, x = perceptron().to(device), torch.zeros(1024, 512, device=device)

    def step() -> None:
        for part in x.chunk(4):
            (model(part).pow(2).mean() / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        model.zero_grad()

    return step


def checkpointing(device: str) -> Step:
    model, x = perceptron(depth=8).to(device), torch.zeros(2048, 512, device=device, requires_grad=True)

    def step() -> None:
        hidden = x
        for place in range(0, len(model), 2):
            hidden = checkpoint(model[place : place + 2], hidden, use_reentrant=False)
        hidden.sum().backward()
        model.zero_grad()
        x.grad = None

    return step


def attention(device: str) -> Step:
    q, k, v = (torch.zeros(4, 8, 256, 32, device=device, requires_grad=True) for _ in range(3))
    mask = torch.ones(256, 256, dtype=torch.bool, device=device).tril()

    def step() -> Tensor:
        scores = (q @ k.transpose(-2, -1) / 6).masked_fill(~mask, float("-inf"))
        result = scores.softmax(-1) @ v
        result.sum().backward()
        q.grad = k.grad = v.grad = None
        return result

    return step


def teacher(device: str) -> Step:
    model, mean = perceptron().to(device), perceptron().to(device).requires_grad_(False)
    x = torch.zeros(1024, 512, device=device)

    def step() -> None:
        with torch.no_grad():
            target = mean(x)
        functional.smooth_l1_loss(model(x), target).backward()
        with torch.no_grad():
            for slow, fast in zip(mean.parameters(), model.parameters(), strict=True):
                slow.mul_(0.99).add_(fast, alpha=0.01)
        model.zero_grad()

    return step


def growing_cache(device: str) -> Step:
    model, x = nn.Linear(512, 1024, bias=False).to(device), torch.zeros(64, 1, 512, device=device)

    @torch.no_grad()
    def step() -> Tensor:
        keys = torch.empty(64, 0, 512, device=device)
        for _ in range(48):
            key, value = model(x).chunk(2, dim=-1)
            keys = torch.cat([keys, key + value], dim=1)
        return keys

    return step


def lookup(device: str) -> Step:
    table, ids = nn.Embedding(5000, 256).to(device), torch.zeros(64, 32, dtype=torch.long, device=device)
    head = nn.Linear(256, 5000, bias=False).to(device)

    def step() -> None:
        logits = head(table(ids))
        functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        table.zero_grad()
        head.zero_grad()

    return step


def second_order(device: str) -> Step:
    x = torch.zeros(1024, 1024, device=device, requires_grad=True)

    def step() -> None:
        (gradient,) = torch.autograd.grad((x.tanh() * x).sum(), x, create_graph=True)
        gradient.pow(2).mean().backward()
        x.grad = None

    return step


PROGRAMS: dict[str, Callable[[str], Step]] = {
    "perceptron, SGD with momentum": sgd,
    "perceptron, AdamW, cross-entropy": adamw,
    "gradients of four parts, clipped": accumulation,
    "checkpoints without re-entry": checkpointing,
    "attention of plain operators, masked": attention,
    "student and a mean teacher": teacher,
    "generation, a cache that grows": growing_cache,
    "embedding, head, cross-entropy": lookup,
    "gradient of a gradient": second_order,
}


class AtReturns(TorchDispatchMode):
    """Notes the time and what CUDA's allocator holds whenever an operator has returned: what kernels take inside
    themselves is gone by then."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.append((time.time_ns(), requested_bytes()))
        return result


def requested_bytes() -> int:
    """What CUDA's allocator holds, as it was asked for."""
    return int(torch.cuda.memory_stats().get("requested_bytes.all.current", 0))


def own_peak(name: str, device: str) -> int:
    """Most bytes of the second step of a program that live at once when an operator returns, by the device's allocator
    and, of what stays there, the host's. cuBLAS's workspaces are there since the first step."""
    step = PROGRAMS[name](device)
    step()
    before = requested_bytes()
    with count_cpu_allocations() as host, AtReturns() as returns:
        kept = step()
    del kept
    return max(held + host.live_at(when) for when, held in returns.seen) - before
