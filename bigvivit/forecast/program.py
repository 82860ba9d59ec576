"""The memory of any program's training step, for a program that knows nothing of this."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.corrections import Name, as_on_cuda
from bigvivit.forecast.fake import forget_fake_tensors, replace_parameters, uncounted_shapes
from bigvivit.forecast.swap import find_tensors, without_memory, without_weak_references
from bigvivit.forecast.trace import STEPS, Trace, finish, note_gradients, note_states
from bigvivit.forecast.tracker import Tracker
from bigvivit.forecast.undo import undone
from bigvivit.versions import require_known


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
    nothing is computed or changed, and what else `step` reaches and changes in Python (schedulers, scalers, lists) is
    put back. Graphs that were made before cannot be run any more. Build what is too large for this machine on the meta
    device, or all of the program inside `fake_tensors()`. Other tensors that `step` uses count from their first use on,
    as input.

    The program must run on the CPU, which stands for the device; `card` makes the corrections of
    `forecast/corrections.py` but for those named in `without`. Values do not exist: a whole number that is read is 1,
    another 0.5, and a truth False, but for that of `all` and `not`; what decides by values (L-BFGS keeps its history by
    them) may go another way than in training. What the step raises comes out, with its traceback as the text of its
    cause. Raises ConfigError for what depends on values, and where something else holds on to modules' tensors.
    """
    named, optimizers = check_program(modules, optimizer)
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
        stack.enter_context(undone(step, named, optimizers))
        stack.enter_context(as_on_real_tensors())
        stack.callback(tracker.inputs.clear)
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


def check_program(
    modules: nn.Module | Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
) -> tuple[Mapping[str, nn.Module], list[torch.optim.Optimizer]]:
    """Both with many of each. Raises ConfigError for what is neither, and for weights that have no shape yet."""
    named = {"": modules} if isinstance(modules, nn.Module) else modules
    if not isinstance(named, Mapping) or not all(isinstance(module, nn.Module) for module in named.values()):
        raise ConfigError(f"modules is {type(modules).__name__}: give a module, or a dict of names to modules")
    single = optimizer is None or isinstance(optimizer, torch.optim.Optimizer)
    optimizers: Any = [optimizer] * (optimizer is not None) if single else optimizer
    if not isinstance(optimizers, Sequence) or not all(isinstance(one, torch.optim.Optimizer) for one in optimizers):
        raise ConfigError(
            f"optimizer is {type(optimizer).__name__}: give an optimizer of torch.optim, or a list of them"
        )
    for root, module in named.items():
        for name, parameter in module.named_parameters():
            if nn.parameter.is_lazy(parameter):
                raise ConfigError(f"{root}.{name}".strip(".") + " has no shape yet: run the lazy module once before")
    return named, list(optimizers)


class StepError(Exception):
    """The traceback of what a step raised, as text: a cause that holds no frames, shown on every Python."""

    def __str__(self) -> str:
        return f"in the traced step:\n{self.args[0]}"


def run(step: Callable[[], Any]) -> None:
    """One step. What it raises is freed of the step's frames, which hold tensors and graphs; where the step needs
    values it is an error for users."""
    try:
        step()
    except BaseException as error:
        failure = error
    else:
        return
    text = "".join(traceback.format_exception(failure))
    known = explain(failure)
    link: BaseException | None = failure
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        following = link.__cause__ or link.__context__
        link.__traceback__ = link.__cause__ = link.__context__ = None
        link = following
    if known is not None:
        raise ConfigError(known)
    raise failure from StepError(text)


def explain(failure: BaseException) -> str | None:
    """For users, why a trace cannot do what fails with this; None for errors of their own."""
    if isinstance(failure, DynamicOutputShapeException | DataDependentOutputException):
        return (
            f"the step calls {failure.func}, whose result depends on values, and a trace has none: use an operator "
            "whose result has a known shape (a mask instead of an index, for one)"
        )
    if isinstance(failure, RuntimeError) and ".numpy() is not supported" in str(failure):
        return "the step asks a tensor for its NumPy array, and a trace has no values: leave that out of the step"
    if isinstance(failure, RuntimeError) and "DataLoader worker process" in str(failure):
        return (
            "the step starts a DataLoader's workers, which see no fake tensors: take the batch before, or num_workers=0"
        )
    if isinstance(failure, NotImplementedError) and "Sparse" in str(failure):
        return "the step makes sparse tensors, which a trace does not follow: embeddings with sparse=False, for one"
    return None


@contextmanager
def as_on_real_tensors() -> Iterator[None]:
    """What looks at tensors, or at their values, goes the way it goes in training."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it prints a traceback of its own before every error
    with ExitStack() as stack:
        stack.callback(log.setLevel, level)
        stack.enter_context(patch.object(nn.Module, "_apply", replace_parameters))
        stack.enter_context(patch.object(FakeTensor, "__format__", format_value))
        stack.enter_context(uncounted_shapes())
        scaler = torch.amp.GradScaler  # it skips a step whose gradients are not finite
        stack.enter_context(patch.object(scaler, "_maybe_opt_step", lambda _, one, __, *a, **k: one.step(*a, **k)))
        transformers = sys.modules.get("transformers.utils.import_utils")
        if hasattr(transformers, "is_fake_tensor"):  # it makes masks for fake tensors that real ones do without
            stack.enter_context(patch.object(transformers, "is_fake_tensor", lambda _: False))
        yield


def format_value(tensor: Tensor, form: str) -> str:
    """As numbers are written where there are values."""
    return format(tensor.item(), form) if tensor.dim() == 0 else object.__format__(tensor, form)


def new_mode() -> FakeTensorMode:
    """Tensors of the outside come in as fake ones."""
    require_known("a forecast", "torch")
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Inside, a program is built without memory, however large it is. Trace it with `trace_step`, here or after."""
    with patch.object(nn.Module, "_apply", replace_parameters), new_mode() as mode:
        try:
            yield mode
        finally:
            forget_fake_tensors()


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
