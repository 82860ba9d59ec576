"""A language model written anew after published recordings of a real GPU (../shared/traces: forward passes in fp32 and
bf16 autocast, batch 4, 128 tokens): 12 layers, width 768, 12 heads, SwiGLU of 3,072, rotary positions, 10,000 words.

Which operators it has, and where functions end and release their local tensors, was read from the recordings. What the
operators then allocate, cast and release, in which sizes and in which order, is PyTorch's answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TOKENS, WIDTH, HEADS, INNER, LAYERS, WORDS = 128, 768, 12, 3072, 12, 10_000


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def mean_square(self, x: Tensor) -> Tensor:
        total = torch.einsum("...d,...d->...", x, x)
        return total * (1 / WIDTH) + 1e-5

    def forward(self, x: Tensor) -> Tensor:
        square = self.mean_square(x)
        root = square.sqrt()
        return (x / root[..., None]) * self.weight


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def softmax(x: Tensor) -> Tensor:
    highest = x.max(dim=-1, keepdim=True).values
    power = torch.exp(x - highest)
    total = power.sum(dim=-1, keepdim=True)
    return power / total


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("...qd,...kd->...qk", q, k) / 8
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = softmax(scores)
    return weights @ v


class Projection(nn.Module):
    """Casts its input before its weight, as a linear layer does not."""

    def __init__(self, outputs: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class Attention(nn.Module):
    sine: Tensor
    cosine: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (Projection() for _ in range(4))
        angles = torch.arange(TOKENS)[:, None] * torch.arange(WIDTH // HEADS)[None]
        self.register_buffer("sine", angles.sin(), persistent=False)
        self.register_buffer("cosine", angles.cos(), persistent=False)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        sine, cosine = self.sine[positions], self.cosine[positions]
        return x * cosine + rotate_half(x) * sine

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        q = self.rotate(q, positions)
        k = self.rotate(k, positions)
        mask = torch.tril(torch.ones(TOKENS, TOKENS, device=x.device)).bool()
        result = attend(q, k, v, mask)
        merged = result.transpose(1, 2).reshape(x.shape)
        return self.out(merged)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.third = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.second = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.first(x), self.third(x)
        result = self.second((gate * torch.sigmoid(gate)) * value)
        return result.to(x.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between, self.attention, self.inner = Norm(), Norm(), Attention(), Gated()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        normed = self.before(x)
        attended = self.attention(normed, positions)
        middle = x + attended
        again = self.between(middle)
        fed = self.inner(again)
        return middle + fed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, WIDTH), Norm()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = Projection(WORDS)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        x = self.words(ids)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        for block in self.blocks:
            x = block(x, positions)
        return self.head(self.norm(x))


def forward(autocast: bool) -> Callable[[], Any]:
    """A forward pass in fp32 or in bf16 autocast."""
    model, ids = Model().cuda(), torch.zeros(4, TOKENS, dtype=torch.long, device="cuda")

    def run() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            model(ids)

    return run
