"""A world in which the real program runs without memory: fake tensors, and what they need changed, scoped.

The CPU stands for the target's device. Where the target has memory of its own, apart from the host's, what lives on the
host is on a device of another type, so that copies between the two are seen.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import _lru_cache_wrapper
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor._op_schema import OpSchema
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from bigvivit.forecast.tracker import HOST
from bigvivit.memory import engine, offload, placement
from bigvivit.versions import require_known


@contextmanager
def fake_world(*, host: bool) -> Iterator[FakeTensorMode]:
    """Inside, tensors are fake; `host` says whether the target's memory is another than the host's."""
    require_known("a forecast", "torch")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        # Module.to swaps a fake parameter for its new self, which fails where anything refers to it weakly.
        stack.enter_context(patch.object(nn.Module, "_apply", replace_parameters))
        # Nothing is copied in the background: there is nothing to copy.
        stack.enter_context(patch.object(placement.Mover, "start", lambda mover, fill, landing, target: arrive(target)))
        stack.enter_context(patch.object(engine, "DistributedDataParallel", FakeDdp))
        stack.enter_context(patch.object(placement, "write_bytes", lambda file, offset, buffer: None))
        if host:
            stack.enter_context(patch.object(placement, "to_host", lambda tensor: on_host(mode, tensor)))
            stack.enter_context(
                patch.object(offload, "empty_on_host", lambda nbytes, pinned: bytes_on_host(mode, nbytes))
            )
        # It looks for a GPU whenever a tensor is made, and where there is none it starts NVML to do so.
        stack.enter_context(patch.object(FakeTensorMode, "avoid_device_init", mode.avoid_device_init))
        stack.enter_context(uncounted_shapes())
        stack.callback(forget_fake_tensors)
        stack.enter_context(mode)
        yield mode


def uncounted_shapes() -> AbstractContextManager[Any]:
    """The first time in a process, DTensor learns an operator's shapes by running it on fake tensors as large as the
    sharded ones; in training they take no memory, and in a trace they would count as the program's."""
    learn = ShardingPropagator._propagate_tensor_meta_non_cached

    def learn_apart(propagator: ShardingPropagator, schema: OpSchema) -> Any:
        with _disable_current_modes():
            return learn(propagator, schema)

    return patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", learn_apart)


def forget_fake_tensors() -> None:
    """Empty the caches of functions (functools.lru_cache) that hold a fake tensor: real programs would be given it.

    DINOv3's positions are kept so, for one.
    """
    for cache in [found for found in gc.get_objects() if type(found) is _lru_cache_wrapper]:
        held = gc.get_referents(cache)
        held += [value for table in held if type(table) is dict for value in table.values()]  # of one without bounds
        if any(isinstance(leaf, FakeTensor) for value in held for leaf in tree_leaves(value)):
            cache.cache_clear()


class FakeDdp(nn.Module):
    """DistributedDataParallel's memory: buckets as large as all gradients, beside these. Its C++ code reads values.

    Once, after the first backward, it makes its buckets anew in the order of the gradients before it drops the old.
    """

    def __init__(self, module: nn.Module, device_ids: list[int] | None = None) -> None:
        super().__init__()
        self.module = module
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.buckets = self.build_buckets()
        self.forwards = 0

    def build_buckets(self) -> list[Tensor]:
        """One for each element type."""
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.trained:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        return [torch.empty(size, dtype=dtype) for dtype, size in sizes.items()]

    def forward(self, clips: Tensor) -> Tensor:
        """The module's own."""
        self.forwards += 1
        if self.forwards == 2:
            self.buckets = self.build_buckets()
        output: Tensor = self.module(clips)
        return output

    def no_sync(self) -> AbstractContextManager[None]:
        """Nothing is reduced either way."""
        return nullcontext()


def arrive(target: Tensor) -> placement.Here:
    """A copy that has been made."""
    return placement.Here(target)


def on_host(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A contiguous tensor like this one in the host's memory."""
    stride = torch._prims_common.make_contiguous_strides_for(tensor.shape)
    return fake_tensor(mode, tensor.shape, stride, tensor.dtype, torch.device(HOST))


def bytes_on_host(mode: FakeTensorMode, nbytes: int) -> Tensor:
    """So many of the host's memory."""
    return fake_tensor(mode, (nbytes,), (1,), torch.uint8, torch.device(HOST))


def fake_tensor(
    mode: FakeTensorMode, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A fake tensor that no mode sees being made."""
    with torch._C._DisableTorchDispatch():
        meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return FakeTensor(mode, meta, device)


def replace_parameters(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `Module._apply` does, with a new parameter in the place of one that changes."""
    if recurse:
        for child in module.children():
            child._apply(fn)
    tables: list[dict[str, Any]] = [module._parameters, module._buffers]
    for table in tables:
        for name, old in table.items():
            if old is not None:
                with torch.no_grad():
                    new = fn(old)
                if new is not old:
                    table[name] = nn.Parameter(new, old.requires_grad) if table is module._parameters else new
    return module


@contextmanager
def fake_ranks(world: int, rank: int, *, always: bool) -> Iterator[None]:
    """A process group of this size in which only `rank` exists and collectives do nothing; for one rank if `always`."""
    if world == 1 and not always:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
