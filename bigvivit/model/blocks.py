"""What the spatial and the temporal transformer share: stochastic depth and initial weights."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import nn

TABLE_STD = 0.02
"""Standard deviation of initial position embeddings and CLS tokens."""


class StochasticDepth:
    """A forward hook that drops a residual branch per example, as the original implementation does.

    Kept branches are not divided by the rate of keeping, unlike in torchvision's and timm's versions, so the function
    that is evaluated is the one whose branches were all kept (reference/vivit.md §1). A hook, because the residual
    additions stand inside Hugging Face's layers.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, branch: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not branch.training:
            return output
        x = output[0] if isinstance(output, tuple) else output  # attention also returns its weights, or None
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        x = x * (torch.rand(shape, device=x.device) >= self.rate).to(x.dtype)
        return (x, *output[1:]) if isinstance(output, tuple) else x


def apply_stochastic_depth(layers: nn.ModuleList, rate: float) -> None:
    """Drop layer l's two branches, each by itself, with probability rate * l / (L - 1)."""
    for depth, layer in enumerate(layers):
        depth_rate = rate * depth / max(len(layers) - 1, 1)
        if depth_rate > 0:
            for branch in residual_branches(layer):
                branch.register_forward_hook(StochasticDepth(depth_rate))


def residual_branches(layer: nn.Module) -> list[nn.Module]:
    """What gives a layer's two residual branches: the attention and the MLP in Hugging Face's.

    timm's have a module in the place where they would drop a branch themselves: behind its norm, where that comes last.
    """
    timms, known = ("drop_path1", "drop_path2"), ("attention", "self_attn", "mlp", "ffn")
    names = [name for name in (timms if hasattr(layer, timms[0]) else known) if hasattr(layer, name)]
    assert len(names) == 2, f"{type(layer).__name__} has no attention and MLP under a known name"
    return [getattr(layer, name) for name in names]


@torch.no_grad()
def init_weights(module: nn.Module, seed: int, name: str, layer_scale: float = 1.0) -> None:
    """Initial weights of a transformer's part, as in the original; for (seed, name) the same in whatever order.

    Matrices xavier-uniform with zero bias, patch kernels by fan-in, norms 1 and 0, tables of positions and CLS tokens
    normal with 0.02, layer scale (DINOv2, EVA) constant.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    for part in module.modules():
        for key, parameter in part.named_parameters(recurse=False):
            # Drawn in fp32 whatever it is stored in: generators give other numbers for other types.
            value = torch.empty(parameter.shape, dtype=torch.float32)
            if isinstance(part, nn.Linear) and key == "weight":
                nn.init.xavier_uniform_(value, generator=generator)
            elif isinstance(part, nn.Conv2d) and key == "weight":
                nn.init.trunc_normal_(value, std=math.sqrt(1 / value[0].numel()), generator=generator)
            elif key == "weight" and "norm" in type(part).__name__.lower():
                nn.init.ones_(value)
            elif key in ("bias", "q_bias", "v_bias"):
                nn.init.zeros_(value)
            elif key in ("lambda1", "gamma", "gamma_1", "gamma_2"):
                nn.init.constant_(value, layer_scale)
            else:
                nn.init.normal_(value, std=TABLE_STD, generator=generator)
            parameter.copy_(value)
