"""Every storage that a program's operators make, as events: bytes, device, phase, module and cause.

One dispatch mode counts a storage when an operator returns it and uncounts it when it dies, so on fake tensors it sees
what the real program would allocate. What kernels allocate inside themselves no dispatch mode sees.
"""

from __future__ import annotations

import bisect
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from bigvivit.forecast.speed import count_flops

Phase = Literal["build", "forward", "backward", "optimizer"]
HOST = "lazy"
"""Stands for the host beside a device that stands for the accelerator: fake tensors of this type need no driver."""
aten = torch.ops.aten


@dataclass(eq=False, slots=True)
class Allocation:
    """One storage."""

    number: int
    nbytes: int
    device: str
    step: int
    phase: Phase
    cause: str
    module: str
    """The innermost module that runs, in a backward the one whose forward it belongs to; empty outside of all."""
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True)
class Event:
    """A change of live bytes. `change` is positive where memory is taken, negative where it goes back."""

    allocation: Allocation
    change: int
    step: int
    phase: Phase


@dataclass
class Tracker(TorchDispatchMode):
    """Use as a context around each step of the program. Not to be entered twice at once."""

    names: dict[nn.Module, str] = field(default_factory=dict)
    """Of modules, as people know them."""
    collective_scratch: bool = False
    """Count what gloo takes for itself."""

    def __post_init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.step = 0
        self.flops: Counter[int] = Counter()
        self.phase: Phase = "build"
        self.seen: Phase = "build"
        self.live: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.numbers = itertools.count()
        self.modules: list[nn.Module] = []
        self.causes: list[str] = []
        # Autograd numbers its nodes as the forward makes them: these are the places where another module began.
        self.borders: list[tuple[int, str]] = [(-1, "")]
        self.hooks: list[Any] = []
        self.inputs: set[int] = set()

    def note(self, tensor: Tensor, cause: str, module: str | None = None) -> None:
        """Count a tensor that is there, or say what one that is counted is for, and whose it is."""
        for part in local_tensors(tensor):
            storage = part.untyped_storage()
            known = self.live.get(storage)
            if known is None:
                self.allocate(part, storage, cause, "")
                known = self.live.get(storage)
            if known is not None:
                known.cause = cause
                known.module = known.module if module is None else module

    def allocate(self, tensor: Tensor, storage: torch.UntypedStorage, cause: str, op: str) -> None:
        """A storage that was not there before."""
        device = "host" if tensor.device.type == HOST else tensor.device.type
        if device == "meta":
            return
        phase = self.current_phase()
        allocation = Allocation(
            next(self.numbers), 0, device, self.step, phase, cause, self.current_module(phase), op,
            tuple(tensor.shape), tensor.dtype,
        )  # fmt: skip
        self.live[storage] = allocation
        weakref.finalize(storage, self.resize, allocation, 0)
        self.resize(allocation, storage.nbytes())

    def resize(self, allocation: Allocation, nbytes: int) -> None:
        """The storage has so many bytes now."""
        change = nbytes - allocation.nbytes
        if change:
            phase = self.current_phase()
            if phase != self.seen:
                self.seen = phase
                if phase == "backward":
                    self.begin_backward()
            allocation.nbytes = nbytes
            if not nbytes and phase == "forward" and allocation.cause == "activations":
                allocation.cause = "workspace"  # nothing waited for it
            self.events.append(Event(allocation, change, self.step, phase))

    def begin_backward(self) -> None:
        """What a forward left behind waits for the backward."""
        for allocation in self.live.values():
            if allocation.cause == "workspace" and allocation.nbytes and allocation.phase == "forward":
                allocation.cause = "activations"

    def current_phase(self) -> Phase:
        """A backward is seen from the inside, wherever it was started."""
        return "backward" if torch._C._current_graph_task_id() != -1 else self.phase

    def current_module(self, phase: Phase) -> str:
        """The name of the innermost module that runs, or whose gradient is computed."""
        node = torch._C._current_autograd_node() if phase == "backward" else None
        if node is not None and not self.modules:
            place = bisect.bisect_right(self.borders, node._sequence_nr(), key=lambda border: border[0])
            return self.borders[place - 1][1]
        return self.names.get(self.modules[-1], "") if self.modules else ""

    @contextmanager
    def cause(self, name: str) -> Iterator[None]:
        """What is allocated inside is for this."""
        self.causes.append(name)
        try:
            yield
        finally:
            self.causes.pop()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch comes back here with the local tensors
        if func is aten._local_scalar_dense.default:
            return (args[0].dtype.is_floating_point and 1.0) or 1  # a value that does not exist is taken for one
        if func is aten.add.Tensor and self.adds_in_place(args):
            return aten.add_.Tensor(*args)
        result = func(*args, **(kwargs or {}))
        self.flops[self.step] += count_flops(func, args, kwargs or {}, result)
        if func.namespace == "c10d":
            if self.collective_scratch:
                self.scratch(func, args)
            return result
        if func is not aten.detach.default:
            name = str(func)
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, Tensor):
                    storage = value.untyped_storage()
                    if storage not in self.live:
                        self.allocate(value, storage, self.usual_cause(), name)
        return result

    def scratch(self, func: Any, args: tuple[Any, ...]) -> None:
        """What gloo flattens its lists of tensors into, as long as a collective runs."""
        sizes = [tensor.nbytes for tensor in torch.utils._pytree.tree_leaves(args) if isinstance(tensor, Tensor)]
        name = func._schema.name
        if sizes and ("allgather" in name or "reduce_scatter" in name):
            phase = self.current_phase()
            allocation = Allocation(
                next(self.numbers), 0, "cpu", self.step, phase, "collectives", self.current_module(phase), name,
                (max(sizes),), torch.uint8,
            )  # fmt: skip
            self.resize(allocation, max(sizes))
            self.resize(allocation, 0)

    def usual_cause(self) -> str:
        """What an operator's result is for, as far as that shows when it is made."""
        if self.causes:
            return self.causes[-1]
        return "activations" if self.current_phase() == "forward" and torch.is_grad_enabled() else "workspace"

    def adds_in_place(self, args: tuple[Any, ...]) -> bool:
        """Whether autograd, on real tensors, would add this gradient to the one it has instead of making a third.

        torch/csrc/autograd/input_buffer.cpp: where nobody else holds the one it has. Fake tensors are subclasses,
        which it adds out of place.
        """
        if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or len(args) != 2:
            return False
        old, new = args
        return (
            isinstance(old, Tensor)
            and isinstance(new, Tensor)
            and old.shape == new.shape
            and old.dtype == new.dtype
            and old.is_contiguous()
            and cast(Any, old)._use_count() <= HELD_BY_BUFFER_ALONE[0]  # typed since torch 2.15 only
            and torch._C._storage_Use_Count(old.untyped_storage()._cdata) <= HELD_BY_BUFFER_ALONE[1]
        )

    def __enter__(self) -> Tracker:
        self.hooks = [
            register_module_forward_pre_hook(self.begin_module),
            register_module_forward_hook(self.end_module, always_call=True),
        ]
        original: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, nbytes: int) -> Any:
            result = original(storage, nbytes)
            if storage in self.live:
                self.resize(self.live[storage], nbytes)
            return result

        self.original_resize = original
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]  # how FSDP2 frees what it gathered
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self.original_resize  # type: ignore[method-assign]
        for hook in self.hooks:
            hook.remove()
        self.modules.clear()

    def begin_module(self, module: nn.Module, inputs: Any) -> None:
        self.modules.append(module)
        self.borders.append((torch._C._autograd._get_sequence_nr(), self.names.get(module, "")))

    def end_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        while self.modules and self.modules.pop() is not module:
            pass  # one that raised
        name = self.names.get(self.modules[-1], "") if self.modules else ""
        self.borders.append((torch._C._autograd._get_sequence_nr(), name))


HELD_BY_BUFFER_ALONE = (4, 2)
"""References to a tensor and to its storage as seen from a dispatch mode, when only autograd's buffer holds it."""


def local_tensors(tensor: Tensor) -> tuple[Tensor, ...]:
    """What a rank has in memory of a tensor."""
    if isinstance(tensor, DTensor):
        return (tensor.to_local(),)
    return (tensor,)
