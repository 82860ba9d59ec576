"""A second language model written anew after published recordings of a real GPU (../shared/traces: inference in fp32,
training in fp32 and in bf16 autocast, batch 4, 128 to 1,024 tokens): 24 layers, width 1,024, 16 heads, SwiGLU of
4,096, rotary positions, 10,000 words, and an AdamW whose moments are new tensors in each step.

Which operators it has, and where functions end and release their local tensors, was read from the recordings, as in
`recorded`; so was that products are einsums (their gradients are copied once more) and that norms take `rsqrt` (its
derivative has three temporaries, that of `sqrt` two).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCH, WIDTH, HEADS, INNER, LAYERS, WORDS = 4, 1024, 16, 4096, 24, 10_000


class Projection(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * (x * scale)


class Rotation(nn.Module):
    table: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        angles = torch.arange(length)[:, None] * torch.arange(WIDTH // HEADS // 2)[None]
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.unflatten(-1, (-1, 2)).movedim(-1, 0)
        cosine, sine = self.table[:, : x.shape[-2]]
        left = cosine * first - sine * second
        right = sine * first + cosine * second
        return torch.stack([left, right], dim=-1).flatten(-2)


def softmax(x: Tensor) -> Tensor:
    lower = x - x.max(dim=-1, keepdim=True).values
    power = torch.exp(lower)
    return power / power.sum(dim=-1, keepdim=True)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("...qd,...kd->...qk", q, k) / 8
    scores = torch.where(mask, scores, float("-inf"))
    weights = softmax(scores)
    return torch.einsum("...qk,...kd->...qd", weights, v)


class Attention(nn.Module):
    def __init__(self, rotation: Rotation) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (Projection(WIDTH, WIDTH) for _ in range(4))
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (q, k, v))
        q = self.rotation(q)
        k = self.rotation(k)
        places = torch.arange(x.shape[1], device=x.device)
        mask = places[:, None] >= places[None]
        result = attend(q, k, v, mask).transpose(1, 2).flatten(-2)
        return self.out(result)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Projection(WIDTH, INNER), Projection(INNER, WIDTH)
        self.third = Projection(WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(silu(self.first(x)) * self.third(x))


class Block(nn.Module):
    def __init__(self, rotation: Rotation) -> None:
        super().__init__()
        self.attention, self.inner = Attention(rotation), Gated()
        self.before, self.between = Norm(), Norm()

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention(self.before(x))
        middle = x + attended
        fed = self.inner(self.between(middle))
        return middle + fed


class Model(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.zeros(WORDS, WIDTH))
        rotation = Rotation(length)
        self.blocks = nn.ModuleList(Block(rotation) for _ in range(LAYERS))
        self.norm, self.head = Norm(), Projection(WIDTH, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.words[x]
        x = embedded
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x)


def log_softmax(x: Tensor) -> Tensor:
    highest = x.max(dim=-1, keepdim=True).values
    x = x - highest
    return x - torch.log(torch.exp(x).sum(dim=-1, keepdim=True))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    costs = -log_softmax(logits)
    return torch.gather(costs, -1, labels[..., None]).mean()


class AdamW(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad.data
                parameter.data -= 1e-5 * parameter.data
                first = state.get("first", torch.zeros_like(gradient))
                second = state.get("second", torch.zeros_like(gradient))
                next_first = 0.9 * first + 0.1 * gradient
                next_second = 0.999 * second + 0.001 * gradient**2
                parameter.data -= 1e-3 * next_first / (torch.sqrt(next_second) + 1e-8)
                state["first"], state["second"] = next_first, next_second


def inference(length: int) -> Callable[[], Any]:
    """A forward pass in fp32."""
    model, data = Model(length).cuda(), make_batches(length)
    ids = data[0].clone()

    @torch.no_grad()
    def run(data: Tensor = data) -> None:
        model(ids)

    return run


def training(length: int, autocast: bool) -> Callable[[], Any]:
    """A step in fp32 or in bf16 autocast; the gradients of the last one are dropped before it."""
    model = Model(length).cuda()
    data = [make_batches(length), make_batches(length)]
    ids, labels = (batches[0].clone() for batches in data)
    optimizer = AdamW(model.parameters())

    def run(data: list[Tensor] = data) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits = model(ids)
            loss = cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return logits, loss

    run.clear = optimizer.zero_grad  # type: ignore[attr-defined]
    return run


def make_batches(length: int) -> Tensor:
    """All data is on the device, as recorded: five batches, and a copy of one."""
    return torch.zeros(5, BATCH, length, dtype=torch.long, device="cuda")
