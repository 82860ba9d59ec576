"""The memory of any program's training step, for a program that knows nothing of this."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import swap_tensors

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.corrections import Name, as_on_cuda
from bigvivit.forecast.fake import fake_tensor, forget_fake_tensors, replace_parameters
from bigvivit.forecast.trace import STEPS, Trace, finish, note_gradients, note_states
from bigvivit.forecast.tracker import Tracker


def trace_step(
    step: Callable[[], Any],
    *,
    modules: nn.Module | Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    card: Accelerator | None = None,
    without: Collection[Name] = (),
    steps: int = STEPS,
) -> Trace:
    """Every allocation and release of `steps` calls of `step`, a function that makes one training step of anything.

        model = torchvision.models.resnet50()
        optimizer = torch.optim.AdamW(model.parameters())
        images, labels = torch.randn(32, 3, 224, 224), torch.zeros(32, dtype=torch.int64)

        def step():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

        trace = trace_step(step, modules=model, optimizer=optimizer)
        print(trace.peak_bytes(), trace.composition())

    `modules` hold all that is trained, and `optimizer` updates it; without either, gradients and states are counted as
    activations and workspace. They keep what they are and hold: while this runs, their tensors have no memory, so
    nothing is computed or changed. Graphs that were made before cannot be run any more. Build what is too large for
    this machine on the meta device, or all of the program inside `fake_tensors()`. Other tensors that `step` uses
    count from their first use on, as input.

    The program must run on the CPU, which stands for the device; `card` makes the corrections of
    `forecast/corrections.py` but for those named in `without`. Values do not exist: one that is read is 1. Raises
    ConfigError for shapes that depend on values, and where something else holds on to the modules' tensors.
    """
    named = {"": modules} if isinstance(modules, nn.Module) else modules
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
    parameters = [p for module in named.values() for p in module.parameters()]
    mode = next((p.fake_mode for p in parameters if isinstance(p, FakeTensor)), new_mode())
    tracker = Tracker(inputs_of=mode, in_place="in-place" not in without)
    tracker.phase = "forward"
    for root, module in named.items():
        tracker.names.update({part: f"{root}.{name}".strip(".") for name, part in module.named_modules()})
    with ExitStack() as stack:
        stack.callback(forget_fake_tensors)
        stack.enter_context(without_weak_references(named.values()))
        stack.enter_context(without_memory(find_tensors(named.values(), optimizers), mode))
        stack.enter_context(mode)
        if card is not None:
            stack.enter_context(as_on_cuda(tracker, card, without))
        for module in named.values():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                owner = module.get_submodule(name.rpartition(".")[0])
                tracker.note(tensor.detach(), "weights", module=tracker.names[owner])
        for each in optimizers:
            stack.enter_context(note_states(tracker, each))
            stack.enter_context(mark_phase(tracker, each))
        for parameter in parameters:
            note_gradients(tracker, [parameter])
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(lambda p: note_gradients(tracker, [p]))
                stack.callback(hook.remove)
        for _ in range(steps):
            tracker.step += 1
            with tracker:
                run(step)
        return finish(tracker)


def run(step: Callable[[], Any]) -> None:
    """One step, and an error for users where it needs values."""
    try:
        step()
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise ConfigError(
            f"the step calls {error.func}, whose result depends on values, and a trace has none: use an operator whose "
            "result has a known shape (a mask instead of an index, for one)"
        ) from None


def new_mode() -> FakeTensorMode:
    """Tensors of the outside come in as fake ones."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Inside, a program is built without memory, however large it is. Trace it with `trace_step`, here or after."""
    with patch.object(nn.Module, "_apply", replace_parameters), new_mode() as mode:
        try:
            yield mode
        finally:
            forget_fake_tensors()


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
    try:
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor):
                fake = imitate(tensor, mode)
                swap(tensor, fake)
                swapped.append((tensor, fake))
        yield
    finally:
        gc.collect()  # a graph in a cycle would hold what is to be swapped back
        for tensor, real in reversed(swapped):
            swap(tensor, real)


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


def imitate(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor in its place: a leaf, with a gradient if it has one."""
    device = torch.device("cpu")
    fake = fake_tensor(mode, tensor.shape, tensor.stride(), tensor.dtype, device)
    fake.requires_grad_(tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        fake._is_param = True
    if tensor.grad is not None:
        with torch.no_grad():
            fake.grad = fake_tensor(mode, tensor.grad.shape, tensor.grad.stride(), tensor.grad.dtype, device)
    return fake


def swap(one: Tensor, other: Tensor) -> None:
    """Each becomes the other."""
    try:
        swap_tensors(one, other)
    except RuntimeError as error:
        raise ConfigError(
            f"a tensor of shape {tuple(one.shape)} of modules or optimizer is held by something else ({error}): let go "
            "of losses and outputs that hold a graph, or build the program inside fake_tensors()"
        ) from None


@contextmanager
def mark_phase(tracker: Tracker, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Say when it updates."""

    def begin(*_: Any) -> None:
        tracker.phase = "optimizer"

    def end(*_: Any) -> None:
        tracker.phase = "forward"

    hooks = [optimizer.register_step_pre_hook(begin), optimizer.register_step_post_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
