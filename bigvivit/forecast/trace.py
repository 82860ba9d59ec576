"""The real training step on fake tensors, and its memory to the byte.

`trace_steps` runs the step that training runs, on an engine that was built as training builds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.corrections import Name, as_on_cuda
from bigvivit.forecast.fake import fake_world, on_host
from bigvivit.forecast.repeat import repeat_layers
from bigvivit.forecast.tracker import Allocation, Event, Tracker
from bigvivit.memory.engine import Engine
from bigvivit.memory.offload import Saved
from bigvivit.memory.placement import CpuPlacement, DiskPlacement
from bigvivit.memory.stream import FrozenTower, StreamedLayer
from bigvivit.training.step import LabelledClips, train_step

STEPS = 3
"""Optimizer states appear in the first, ZeRO-3 knows the order of its fetches from the second on."""


@dataclass(frozen=True)
class Part:
    """Some of the bytes that were live at the peak."""

    nbytes: int
    cause: str
    module: str
    op: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Trace:
    """Events of allocation and release, from building to the last step."""

    events: Sequence[Event]
    largest_third_bytes: int = 0
    """The largest tensor that adding gradients in place saved."""
    flops: int = 0
    """Of the matrix products of the last step."""

    def peak_bytes(self, device: str = "cpu") -> int:
        """Most that was live at once, after building."""
        return self.find_peak(device)[1]

    def find_peak(self, device: str = "cpu") -> tuple[int, int]:
        """(place in the events, bytes) of the peak over the steps."""
        live = peak = place = 0
        for index, event in enumerate(self.events):
            if event.allocation.device == device:
                live += event.change
            if event.step > 0 and live > peak:
                peak, place = live, index
        return place, peak

    def left_bytes(self, device: str = "cpu", cause: str | None = None) -> int:
        """Live after the last step, of all causes or of one."""
        return sum(
            event.change
            for event in self.events
            if event.allocation.device == device and cause in (None, event.allocation.cause)
        )

    def building_peak_bytes(self, device: str = "cpu") -> int:
        """Most that was live at once while the model was built and loaded."""
        live = peak = 0
        for event in self.events:
            if event.allocation.device == device and event.step == 0:
                live += event.change
                peak = max(peak, live)
        return peak

    def at_peak(self, device: str = "cpu") -> list[Part]:
        """What was live at the peak, the largest first."""
        place, _ = self.find_peak(device)
        live: Counter[Allocation] = Counter()
        for event in self.events[: place + 1]:
            if event.allocation.device == device:
                live[event.allocation] += event.change
        return [
            Part(size, a.cause, a.module, a.op, a.shape, str(a.dtype).removeprefix("torch."))
            for a, size in live.most_common()
            if size
        ]

    def composition(self, device: str = "cpu") -> dict[str, int]:
        """Bytes at the peak by cause, the largest first."""
        causes: Counter[str] = Counter()
        for part in self.at_peak(device):
            causes[part.cause] += part.nbytes
        return dict(causes.most_common())

    def timeline(self, device: str = "cpu") -> Iterator[tuple[int, Event]]:
        """(live bytes, event) after each event."""
        live = 0
        for event in self.events:
            if event.allocation.device == device:
                live += event.change
                yield live, event


def trace_steps(
    build: Callable[[], tuple[Engine, LabelledClips]],
    *,
    host: bool = False,
    card: Accelerator | None = None,
    without: Collection[Name] = (),
    steps: int = STEPS,
    accumulate: int = 1,
    repeat: bool = True,
) -> Trace:
    """`steps` train steps of the engine that `build()` gives, each of `accumulate` micro-batches like the one it gives.

    `host`: the target's memory is another than the host's, where clips and what is offloaded live. `card` makes the
    corrections of `forecast/corrections.py` but for those named in `without`. `repeat`: of a
    frozen tower's layers and chunks that are alike one runs, and its events stand for all: the trace is the same.
    """
    tracker = Tracker(collective_scratch=not host, in_place="in-place" not in without)
    with ExitStack() as stack:
        mode = stack.enter_context(fake_world(host=host))
        stack.enter_context(label_streams(tracker))
        if card is not None:
            stack.enter_context(as_on_cuda(tracker, card, without))
        if repeat:
            stack.enter_context(repeat_layers(tracker, mode))
        with tracker:
            engine, batch = build()
            batches = repeat_batch(batch, accumulate)
            for batch in batches if host else ():
                batch.clips, batch.labels = on_host(mode, batch.clips), on_host(mode, batch.labels)
        tracker.names.update({module: name for name, module in engine.module.named_modules()})
        for name, parameter in engine.module.named_parameters():
            cause = "trained weights" if parameter.requires_grad else "tower"
            tracker.note(parameter.data, cause, module=name.rpartition(".")[0])
        for buffer in engine.module.buffers():
            tracker.note(buffer, "tower")
        note_placement(tracker, engine.module)
        note_shards(tracker, engine)
        for batch in batches:
            tracker.note(batch.clips, "input")
            tracker.note(batch.labels, "input")
        for _ in range(steps):
            tracker.step += 1
            with tracker:
                train_step(PhasedEngine(engine, tracker), batches)
    return finish(tracker)


def finish(tracker: Tracker) -> Trace:
    """What was tracked so far, without what happens when all of it is let go."""
    return Trace(list(tracker.events), tracker.largest_third, tracker.flops[tracker.step])


def repeat_batch(batch: LabelledClips, count: int) -> list[LabelledClips]:
    """So many micro-batches like this one, each with memory of its own: training holds all of a step's at once."""
    clones = [(batch.clips.clone(), batch.labels.clone()) for _ in range(count - 1)]
    return [batch, *(SimpleNamespace(clips=clips, labels=labels, indices=batch.indices) for clips, labels in clones)]


class PhasedEngine:
    """An engine that says what it is at."""

    def __init__(self, engine: Engine, tracker: Tracker) -> None:
        self.engine, self.tracker = engine, tracker

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, clips: Tensor) -> Tensor:
        self.tracker.phase = "forward"
        return self.engine(clips)

    def backward(self, loss: Tensor) -> None:
        self.tracker.phase = "backward"
        self.engine.backward(loss)
        note_gradients(self.tracker, self.engine.module.parameters())

    def step(self) -> float | None:
        self.tracker.phase = "optimizer"
        with note_states(self.tracker, self.engine.optimizer):  # type: ignore[attr-defined]
            norm = self.engine.step()
        self.tracker.phase = "forward"
        return norm


def note_gradients(tracker: Tracker, parameters: Iterable[nn.Parameter]) -> None:
    """Say which storages are gradients."""
    for parameter in parameters:
        if parameter.grad is not None:
            tracker.note(parameter.grad, "gradients")


@contextmanager
def note_states(tracker: Tracker, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Say which storages are the optimizer's state, when it has made a step."""

    def note(*_: Any) -> None:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    tracker.note(value, "optimizer state")

    hook = optimizer.register_step_post_hook(note)
    try:
        yield
    finally:
        hook.remove()


def note_placement(tracker: Tracker, model: nn.Module) -> None:
    """Say which storages are a packed tower."""
    for part in model.modules():
        if isinstance(part, FrozenTower) and part.placement is not None:
            for buffer in getattr(part.placement, "buffers", ()):
                tracker.note(buffer, "tower")
            for unit in part.units():
                for kept in getattr(unit, "kept", {}).values():
                    tracker.note(kept, "tower")


def note_shards(tracker: Tracker, engine: Engine) -> None:
    """Say which storages are DeepSpeed's: this rank's part of weights, and its buffers."""
    inner = getattr(getattr(engine, "engine", None), "optimizer", None)
    if inner is None:
        return
    for name, value in vars(inner).items():
        buffers = any(word in name for word in ("grad", "ipg", "bucket", "buffer"))
        weights = any(word in name for word in ("fp32", "bit16", "fp16", "partition"))
        if buffers or weights:
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                    tracker.note(tensor, "buckets" if buffers else "trained weights")
    for parameter in engine.module.parameters():
        if hasattr(parameter, "ds_tensor"):
            tracker.note(parameter.ds_tensor, "trained weights" if parameter.requires_grad else "tower")


@contextmanager
def label_streams(tracker: Tracker) -> Iterator[None]:
    """Tell a streamed tower's fetched weights and hidden states, and what comes back for a backward, from work."""

    def labelled(original: Callable[..., Any], cause: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with tracker.cause(cause):
                return original(*args, **options)

        return call

    def note_hidden(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, StreamedLayer):
            for chunk in output:
                tracker.note(chunk[0] if isinstance(chunk, tuple) else chunk, "hidden states")

    with ExitStack() as stack:
        for owner, name in ((StreamedLayer, "weights"), (CpuPlacement, "fetch"), (DiskPlacement, "fetch")):
            stack.enter_context(patch.object(owner, name, labelled(getattr(owner, name), "fetched weights")))
        stack.enter_context(patch.object(Saved, "come", labelled(Saved.come, "activations")))
        hook = register_module_forward_hook(note_hidden)
        stack.callback(hook.remove)
        yield
