"""A frozen layer's work on a chunk, run once: where the same comes again, the events it made are repeated.

Layers of a tower are alike, and so are chunks: ViT-g with 128 frames does the same 960 times in three steps. Without a
graph for a backward nothing of it is left but what it returns, so its events are all there is to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from bigvivit.forecast.fake import fake_tensor
from bigvivit.forecast.tracker import Allocation, Event, Tracker
from bigvivit.memory import stream


@dataclass(frozen=True)
class Output:
    """A tensor that a call returned."""

    place: int
    """Of its storage among the call's allocations."""
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Pattern:
    """What one call did."""

    allocations: list[Allocation]
    changes: list[tuple[int, int]]
    """(place in `allocations`, bytes)."""
    outputs: list[Any]
    """The leaves of what it returned, an `Output` for each tensor."""
    tree: TreeSpec
    module: str
    """The layer that ran."""
    flops: int


@contextmanager
def repeat_layers(tracker: Tracker, mode: FakeTensorMode) -> Iterator[None]:
    """Inside, a frozen layer runs once for each form of weights and inputs."""
    run = stream.functional_call
    known: dict[Any, Pattern] = {}

    def call(layer: nn.Module, weights: dict[str, Tensor], inputs: tuple[Tensor, ...], extras: Any) -> Any:
        if torch.is_grad_enabled():
            return run(layer, weights, inputs, extras)
        module, key = tracker.current_module("forward"), (repr(layer), form((weights, inputs, extras)))
        if key in known:
            return repeat(tracker, mode, known[key], module)
        first, start, flops = tracker.made, len(tracker.events), tracker.flops[tracker.step]
        output = run(layer, weights, inputs, extras)
        flops = tracker.flops[tracker.step] - flops
        pattern = learn(tracker, first, tracker.events[start:], output, module, flops)
        if pattern is not None:
            known[key] = pattern
        return output

    with patch.object(stream, "functional_call", call):
        yield


def form(values: Any) -> tuple[Any, ...]:
    """All that decides what an operator allocates for them."""
    leaves, tree = tree_flatten(values)
    return (tree, *((v.shape, v.stride(), v.dtype, v.device.type) if isinstance(v, Tensor) else v for v in leaves))


def learn(tracker: Tracker, first: int, events: list[Event], output: Any, module: str, flops: int) -> Pattern | None:
    """The call that made these events, its own allocations being those numbered from `first`.

    None where it did more than use memory and return some of it: freed what was there before, or kept what it made.
    """
    places: dict[Allocation, int] = {}
    for event in events:
        if event.allocation.number < first:
            return None
        places.setdefault(event.allocation, len(places))
    kept = {a for a in places if a.nbytes}
    leaves, tree = tree_flatten(output)
    outputs: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            a = tracker.live.get(leaf.untyped_storage())
            if a not in kept or a.nbytes != leaf.nbytes:
                return None  # a view
            kept.remove(a)
            outputs.append(Output(places[a], leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        else:
            outputs.append(leaf)
    if kept:
        return None
    changes = [(places[event.allocation], event.change) for event in events]
    return Pattern([replace(a) for a in places], changes, outputs, tree, module, flops)


def repeat(tracker: Tracker, mode: FakeTensorMode, pattern: Pattern, module: str) -> Any:
    """The same events again, of a layer of another name, and tensors like those that it returned."""
    born = [
        replace(
            a,
            number=tracker.made + place,
            nbytes=0,
            step=tracker.step,
            phase=tracker.phase,
            module=module + a.module.removeprefix(pattern.module),
        )
        for place, a in enumerate(pattern.allocations)
    ]
    tracker.made += len(born)
    tracker.flops[tracker.step] += pattern.flops
    for place, change in pattern.changes:
        born[place].nbytes += change
        tracker.events.append(Event(born[place], change, tracker.step, tracker.phase))
    leaves = list(pattern.outputs)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Output):
            leaves[index] = tensor = fake_tensor(mode, leaf.shape, leaf.stride, leaf.dtype, leaf.device)
            tracker.follow(tensor.untyped_storage(), born[leaf.place])
    return tree_unflatten(leaves, pattern.tree)
