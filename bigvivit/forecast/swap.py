"""Tensors of a program made fake in place, so that whoever refers to them has fake ones, and made real again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import swap_tensors

from bigvivit.config import ConfigError


def find_tensors(modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """Each tensor of these once: weights and buffers, and the optimizers' states."""
    found = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for optimizer in optimizers:
        found += [tensor for group in optimizer.param_groups for tensor in group["params"]]
        found += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return list({id(tensor): tensor for tensor in found}.values())


@contextmanager
def without_memory(tensors: Iterable[Tensor], mode: FakeTensorMode) -> Iterator[None]:
    """Inside, these very objects are fake tensors; whoever refers to them sees no difference but in their values."""
    swapped: list[tuple[Tensor, Tensor]] = []
    storages: dict[int, torch.UntypedStorage] = {}
    try:
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor):
                fake = imitate(tensor, mode, storages)
                swap(tensor, fake)
                swapped.append((tensor, fake))
        yield
    finally:
        gc.collect()  # a graph in a cycle would hold what is to be swapped back
        held = []
        for tensor, real in reversed(swapped):
            try:
                swap(tensor, real)
            except ConfigError as error:
                held.append(error)
        if held:
            raise held[0]


@contextmanager
def without_weak_references(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Recurrent networks note weakly what their weights were; what is referred to weakly cannot be swapped."""
    recurrent = [part for module in modules for part in module.modules() if isinstance(part, nn.RNNBase)]
    for part in recurrent:
        references: Any = [partial(strongly, weight) for weight in part._flat_weights]
        part._flat_weight_refs = references
    try:
        yield
    finally:
        for part in recurrent:
            part._flat_weight_refs = [weakref.ref(w) if w is not None else None for w in part._flat_weights]


def strongly(weight: Tensor | None) -> Tensor | None:
    """As a weak reference is called."""
    return weight


def imitate(tensor: Tensor, mode: FakeTensorMode, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A fake tensor in its place: a leaf, with a gradient if it has one, and hooks and attributes.

    `storages` are those imitated so far: tensors that share memory go on sharing it.
    """
    fake = view_of_storage(tensor, mode, storages)
    fake.requires_grad_(tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        fake._is_param = True
    if tensor.grad is not None:
        with torch.no_grad():
            fake.grad = view_of_storage(tensor.grad, mode, storages)
    if tensor.is_leaf and tensor._backward_hooks:
        fake._backward_hooks = tensor._backward_hooks
    for name, value in vars(tensor).items():
        setattr(fake, name, value)
    return fake


def view_of_storage(tensor: Tensor, mode: FakeTensorMode, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A fake tensor at the same place of a storage like that of this one."""
    real = tensor.untyped_storage()
    with torch._C._DisableTorchDispatch():
        if real._cdata not in storages:
            storages[real._cdata] = torch.empty(real.nbytes(), dtype=torch.uint8, device="meta").untyped_storage()
        meta = torch.empty(0, dtype=tensor.dtype, device="meta")
        meta.set_(storages[real._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
    return FakeTensor(mode, meta, torch.device("cpu"))


def swap(one: Tensor, other: Tensor) -> None:
    """Each becomes the other."""
    try:
        swap_tensors(one, other)
    except RuntimeError as error:
        raise ConfigError(
            f"a tensor of shape {tuple(one.shape)} of modules or optimizer is held by something else ({error}): let go "
            "of losses and outputs that hold a graph, and of weak references to it, or build the program inside "
            "fake_tensors()"
        ) from None
