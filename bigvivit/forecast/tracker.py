"""Every storage that a program's operators make, as events: bytes, device, phase, module and cause.

One dispatch mode counts a storage when an operator returns it and uncounts it when it dies, so on fake tensors it sees
what the real program would allocate. What kernels allocate inside themselves no dispatch mode sees.
"""

from __future__ import annotations

import bisect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
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
    stream: int = 0
    """That it was made on: 0 the program's own, others in the order in which they appear."""


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
    inputs_of: FakeTensorMode | None = None
    """Count real tensors that come from outside, which this mode takes in as fake ones."""
    in_place: bool = True
    """Add gradients in place where autograd would on real tensors."""

    def __post_init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.step = 0
        self.flops: Counter[int] = Counter()
        self.phase: Phase = "build"
        self.seen: Phase = "build"
        self.live: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.made = 0
        # The CPU stands for the device, streams of the CPU, which do nothing, for its streams.
        self.streams = {torch.cpu.current_stream(): 0}
        self.modules: list[nn.Module] = []
        self.causes: list[str] = []
        self.operators: list[str] = []
        self.largest_third = 0
        # Autograd numbers its nodes as the forward makes them: these are the places where another module began.
        self.borders: list[tuple[int, str]] = [(-1, "")]
        self.hooks: list[Any] = []
        self.inputs: dict[int, Tensor] = {}

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
        allocation = self.make(device, cause, op, tuple(tensor.shape), tensor.dtype)
        self.follow(storage, allocation)
        self.resize(allocation, storage.nbytes())

    def make(self, device: str, cause: str, op: str, shape: tuple[int, ...], dtype: torch.dtype) -> Allocation:
        """An allocation that has no bytes yet."""
        phase = self.current_phase()
        self.made += 1
        stream = self.streams.setdefault(torch.cpu.current_stream(), len(self.streams))
        return Allocation(
            self.made - 1, 0, device, self.step, phase, cause, self.current_module(phase), op, shape, dtype, stream
        )

    def follow(self, storage: torch.UntypedStorage, allocation: Allocation) -> None:
        """The allocation ends with this storage."""
        self.live[storage] = allocation
        weakref.finalize(storage, self.resize, allocation, 0)

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
        return next((self.names[module] for module in reversed(self.modules) if module in self.names), "")

    def operator(self, name: str) -> AbstractContextManager[None]:
        """What is allocated inside is one operator's, of this name."""
        return innermost(self.operators, name)

    def cause(self, name: str) -> AbstractContextManager[None]:
        """What is allocated inside is for this."""
        return innermost(self.causes, name)

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch comes back here with the local tensors
        if func is aten._local_scalar_dense.default:
            return self.read(args[0])
        if func in OUT_OF_PLACE and self.in_place and self.holds_alone(func, args):
            self.largest_third = max(self.largest_third, args[0].nbytes)
            return OUT_OF_PLACE[func](*args, **(kwargs or {}))
        if self.inputs_of is not None:
            args, kwargs = tree_map(partial(self.take_in, self.inputs_of), (args, kwargs))
        result = func(*args, **(kwargs or {}))
        self.flops[self.step] += count_flops(func, args, kwargs or {}, result)
        if func.namespace == "c10d":
            if self.collective_scratch:
                self.scratch(func, args)
            return result
        if func is not aten.detach.default:
            name = self.operators[-1] if self.operators else str(func)
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, Tensor):
                    storage = value.untyped_storage()
                    if storage not in self.live:
                        self.allocate(value, storage, self.usual_cause(), name)
        return result

    def read(self, scalar: Tensor) -> float | int | bool:
        """A value that does not exist. Few programs stop at these, or take a way that they seldom take."""
        if scalar.dtype != torch.bool:
            return 0.5 if scalar.dtype.is_floating_point else 1
        known = self.live.get(scalar.untyped_storage())
        return known is not None and known.op.startswith(("aten.all.", "aten.logical_not.", "aten.bitwise_not."))

    def take_in(self, mode: FakeTensorMode, value: Any) -> Any:
        """For a real tensor the fake one that stands for it: counted as long as the real one is there."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor | DTensor):
            return value
        fake = mode.from_tensor(value)
        if fake.untyped_storage() not in self.live:
            self.inputs[id(fake)] = fake
            weakref.finalize(value, self.inputs.pop, id(fake), None)
            self.note(fake, "input")
        return fake

    def scratch(self, func: Any, args: tuple[Any, ...]) -> None:
        """What gloo flattens its lists of tensors into, as long as a collective runs."""
        sizes = [tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
        name = func._schema.name
        if sizes and ("allgather" in name or "reduce_scatter" in name):
            allocation = self.make("cpu", "collectives", name, (max(sizes),), torch.uint8)
            self.resize(allocation, max(sizes))
            self.resize(allocation, 0)

    def usual_cause(self) -> str:
        """What an operator's result is for, as far as that shows when it is made."""
        if self.causes:
            return self.causes[-1]
        return "activations" if self.current_phase() == "forward" and torch.is_grad_enabled() else "workspace"

    def holds_alone(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether autograd, on real tensors, would write into its first argument instead of making another.

        torch/csrc/autograd/input_buffer.cpp: where nobody else holds it. Fake tensors are subclasses, for which it, and
        the backwards of indexing and gathering (FunctionsManual.cpp), take the way that leaves their arguments alone.
        """
        if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or not isinstance(args[0], Tensor):
            return False
        old = args[0]
        if func is aten.add.Tensor:
            new = args[1]
            if len(args) != 2 or not isinstance(new, Tensor) or old.shape != new.shape or old.dtype != new.dtype:
                return False
        return (
            old.is_contiguous()
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


OUT_OF_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.index_put.default: aten.index_put_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter_add.default: aten.scatter_add_.default,
}
"""What autograd calls on subclasses of tensors, and what it calls on real ones."""
HELD_BY_BUFFER_ALONE = (4, 2)
"""References to a tensor and to its storage as seen from a dispatch mode, when only autograd's buffer holds it."""


@contextmanager
def innermost(names: list[str], name: str) -> Iterator[None]:
    """`name` is the last of `names` inside."""
    names.append(name)
    try:
        yield
    finally:
        names.pop()


def local_tensors(tensor: Tensor) -> tuple[Tensor, ...]:
    """What a rank has in memory of a tensor."""
    if isinstance(tensor, DTensor):
        return (tensor.to_local(),)
    return (tensor,)
