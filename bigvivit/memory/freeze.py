"""Freezing, and saying what it saved."""

from __future__ import annotations

import torch
from torch import nn

from bigvivit.units import TORCH_NAMES, format_bytes, format_count


def freeze(module: nn.Module) -> None:
    """No parameter of `module` asks for a gradient any more; it is in eval mode."""
    module.requires_grad_(False)
    module.eval()


def full_numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also while ZeRO-3 holds only a shard of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(trainable, frozen) elements of a module, sharded or not."""
    counts = {True: 0, False: 0}
    for parameter in module.parameters():
        counts[parameter.requires_grad] += full_numel(parameter)
    for part in module.modules():
        counts[False] += sum(
            parameter.numel() for layer in getattr(part, "packed", ()) for parameter in layer.parameters()
        )
    return counts[True], counts[False]


def describe_frozen(name: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """`froze tower: 1.01 B parameters, 1.88 GiB bf16, 0 B optimizer state`, from what is really there."""
    parameters, sizes = list(module.parameters()), stored_bytes(module)
    kinds = "+".join(sorted(sizes, key=lambda kind: -sizes[kind]))
    own = {id(p) for p in parameters}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
    moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
    state = sum(full_numel(p) * p.element_size() * moments for p in held)
    return (
        f"froze {name}: {format_count(count_parameters(module)[1])} parameters, "
        f"{format_bytes(sum(sizes.values()))} {kinds}, {format_bytes(state)} optimizer state"
    )


def stored_bytes(module: nn.Module) -> dict[str, int]:
    """Bytes of a module's weights by the type they are stored in: sharded, packed, or as they are."""
    sizes: dict[str, int] = {}
    slots = [slot for part in module.modules() for slot in getattr(part, "slots", None) or ()]
    for dtype, nbytes in [
        *((p.dtype, full_numel(p) * p.element_size()) for p in module.parameters()),
        *((slot.dtype, slot.nbytes) for slot in slots),
    ]:
        sizes[dtype_name(dtype)] = sizes.get(dtype_name(dtype), 0) + nbytes
    return sizes


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16` for torch.bfloat16."""
    short = {f"torch.{long}": name for name, long in TORCH_NAMES.items()}
    return short.get(str(dtype), str(dtype).removeprefix("torch."))
