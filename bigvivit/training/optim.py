"""Optimizer and learning rate: the paper's SGD (Table 7), AdamW, and what is trained at which rate."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

from bigvivit.config import OptimConfig

PARTS = ("tower", "adapter", "temporal", "head")
TOWER_LAYER = re.compile(r"tower\.layers\.(\d+)\.")
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW, over what asks for a gradient; with fp32 states, or bitsandbytes' of 8 bits."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    layers = count_layers(model)
    for name, parameter, is_matrix in trained_parameters(model):
        groups.setdefault((not is_matrix, peak_rate(name, layers, config)), []).append(parameter)
    # What decays comes first, as it always did: sharded states lie in this order.
    options = [
        {"params": groups[key], "lr": key[1], "weight_decay": 0.0 if key[0] else config.weight_decay}
        for key in sorted(groups, key=lambda key: key[0])
    ]
    if config.eight_bit:
        import bitsandbytes  # here: it looks for CUDA when it is imported, and says so where there is none

        if config.name == "sgd8bit":
            return bitsandbytes.optim.SGD8bit(options, lr=config.lr, momentum=0.9)
        return bitsandbytes.optim.AdamW8bit(options, lr=config.lr)
    if config.name == "sgd":
        return torch.optim.SGD(options, lr=config.lr, momentum=0.9, fused=config.fused or None)
    return torch.optim.AdamW(options, lr=config.lr, fused=config.fused or None)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, parameter, whether weight decay is for it) of all that asks for a gradient, in the model's order.

    Decay is for matrices that multiply what passes through: those of linear layers, convolutions and PyTorch's own
    attention. Towers have tables of positions, tokens and probes under many names, as parameters and as embeddings:
    none of them is one of these.
    """
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                attention = isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight")
                is_matrix = attention or (isinstance(module, MATRICES) and name == "weight")
                yield f"{prefix}.{name}" if prefix else name, parameter, is_matrix


def count_layers(model: nn.Module) -> int:
    """Layers of the tower that are trained."""
    found = (TOWER_LAYER.match(name) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def peak_rate(name: str, layers: int, config: OptimConfig) -> float:
    """The learning rate at its peak of a parameter of this name, in a model whose tower has so many layers.

    In the tower each layer has `layer_decay` times the rate of the one above: the embedding lies below the first, the
    final norm and pooling above the last (BEiT's schedule, arXiv:2106.08254).
    """
    part = name.partition(".")[0].replace("pooling", "adapter")  # both are stage 2's own
    rate = getattr(config, f"{part}_lr") if part in PARTS else None
    rate = config.lr if rate is None else rate
    if part == "tower":
        match = TOWER_LAYER.match(name)
        depth = int(match[1]) + 1 if match else 0 if name.startswith("tower.embed.") else layers + 1
        rate *= config.layer_decay ** (layers + 1 - depth)
    return float(rate)


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, steps_per_epoch: int) -> LRScheduler:
    """Linear warm-up from 0, then a cosine to 0; counted in optimizer steps."""
    return get_cosine_schedule_with_warmup(
        optimizer, config.count_warmup(steps_per_epoch), config.count_steps(steps_per_epoch)
    )
