"""Optimizer and learning rate, as the paper has them (Table 7)."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

from bigvivit.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW, over what asks for a gradient; with fp32 states, or bitsandbytes' of 8 bits."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # what ZeRO-3 has sharded keeps its shape there
            table = any(word in name.rsplit(".", 1)[-1] for word in ("position", "cls", "token"))
            (exempt if len(shape) < 2 or table else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.eight_bit:
        import bitsandbytes  # here: it looks for CUDA when it is imported, and says so where there is none

        if config.name == "sgd8bit":
            return bitsandbytes.optim.SGD8bit(groups, lr=config.lr, momentum=0.9)
        return bitsandbytes.optim.AdamW8bit(groups, lr=config.lr)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.lr)


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, steps_per_epoch: int) -> LRScheduler:
    """Linear warm-up from 0, then a cosine to 0; counted in optimizer steps."""
    return get_cosine_schedule_with_warmup(
        optimizer, round(config.warmup_epochs * steps_per_epoch), total_steps(config, steps_per_epoch)
    )


def total_steps(config: OptimConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run, at least one."""
    return max(1, round(config.epochs * steps_per_epoch))
