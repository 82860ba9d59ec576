"""A frozen tower in one type, computing in another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigvivit.memory import stream
from bigvivit.memory.freeze import count_parameters, describe_frozen, freeze
from bigvivit.memory.measure import count_cpu_allocations
from bigvivit.memory.plan import Stream
from bigvivit.memory.stream import FrozenTower
from bigvivit.model.towers import Tower
from bigvivit.model.weights import random_weights
from tests.model.reference import DEMO, draw_images, load


def build_frozen(
    storage: torch.dtype, compute: torch.dtype, group: int = 3, chunk: int = 3
) -> tuple[Tower, FrozenTower]:
    tower = load(DEMO, random_weights(DEMO, 0), tubelet=2, image_size=48).to(storage)
    freeze(tower)
    return tower, FrozenTower(tower, compute, torch.device("cpu"), lambda *sizes: Stream(group, chunk, "test"))


IMAGES = draw_images(3, 6, 48)
SEVEN = draw_images(7, 6, 48)


def test_storage_is_cast_layer_by_layer_and_not_kept() -> None:
    tower, frozen = build_frozen(torch.bfloat16, torch.float32)
    whole = copy.deepcopy(tower).float()  # bf16 values, all cast at once
    assert torch.equal(frozen(IMAGES), whole(IMAGES))
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_type_is_the_tower_itself(dtype: torch.dtype) -> None:
    tower, frozen = build_frozen(dtype, dtype)
    output = frozen(IMAGES)
    assert output.dtype == dtype
    assert torch.equal(output, tower(IMAGES))


def test_weights_that_are_there_as_they_compute_are_not_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each exchange takes as long as starting many kernels does, and chunk by chunk there is one for each chunk."""
    exchanged: list[object] = []
    call = stream.functional_call

    def count(*arguments: Any) -> Any:
        exchanged.append(arguments[0])
        return call(*arguments)

    monkeypatch.setattr(stream, "functional_call", count)
    for compute, calls in ((torch.float32, 0), (torch.bfloat16, 3 * 6)):  # embedding, four layers, pooling
        _, frozen = build_frozen(torch.float32, compute, group=1, chunk=1)
        frozen(IMAGES)
        assert len(exchanged) == calls


@pytest.mark.parametrize(("group", "chunk"), [(7, 7), (7, 2), (4, 2), (2, 2), (7, 1), (1, 1), (3, 2), (100, 100)])
def test_groups_and_chunks_change_nothing(group: int, chunk: int) -> None:
    """The paper's way, layer-major, chunk-major and between; seven tubelets leave a short group and a short chunk."""
    tower, frozen = build_frozen(torch.float32, torch.float32, group, chunk)
    torch.testing.assert_close(frozen(SEVEN), tower(SEVEN), rtol=1e-6, atol=1e-6)


def test_each_layer_is_called_once_for_a_group() -> None:
    _, frozen = build_frozen(torch.float32, torch.float32, group=4, chunk=2)
    calls: list[tuple[int, int]] = []
    for number, unit in enumerate(frozen.units()):
        unit.register_forward_pre_hook(lambda unit, inputs, number=number: calls.append((number, len(inputs[0]))))
    frozen(SEVEN)
    assert calls == [(unit, 2) for _ in range(2) for unit in range(6)]


def test_autocast_around_it_changes_nothing() -> None:
    _, frozen = build_frozen(torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = frozen(IMAGES)
    assert torch.equal(inside, frozen(IMAGES))


def test_it_stays_in_eval_mode_and_leaves_no_graph() -> None:
    _, frozen = build_frozen(torch.float32, torch.float32)
    nn.Sequential(frozen).train()
    assert not any(part.training for part in frozen.modules())
    assert not frozen(IMAGES).requires_grad


def measure_peak_bytes(frozen: FrozenTower, pixels: torch.Tensor) -> int:
    """What the CPU allocator handed out and had not yet taken back, at most, by its own count."""
    frozen(pixels)  # chooses its stream
    with count_cpu_allocations() as counted:
        frozen(pixels)
    return counted.peak_bytes


def test_only_one_layer_is_cast_at_a_time() -> None:
    _, frozen = build_frozen(torch.bfloat16, torch.float32)
    one_layer = sum(p.numel() * 4 for p in frozen.layers[0].parameters())
    whole = sum(p.numel() * 4 for p in frozen.parameters())
    assert one_layer < measure_peak_bytes(frozen, draw_images(1, 6, 48)) < 2 * one_layer < whole


@pytest.mark.parametrize(("group", "hidden_states"), [(1000, 1), (1, 0)])
def test_memory_grows_by_the_hidden_states_of_the_group_and_by_nothing_else(group: int, hidden_states: int) -> None:
    """Layer-major: by one tubelet's hidden states and its vector for each tubelet; chunk-major: by its vector only."""
    peaks = {}
    for count in (8, 24):
        _, frozen = build_frozen(torch.float32, torch.float32, group, chunk=1)
        peaks[count] = measure_peak_bytes(frozen, draw_images(count, 6, 48))
    grown = (peaks[24] - peaks[8]) / 16
    tokens, width = 17, 128
    assert grown <= hidden_states * tokens * width * 4 * 1.05 + 2 * width * 4
    assert grown >= hidden_states * tokens * width * 4


class LargestFloats(TorchDispatchMode):
    """The most elements of any floating-point tensor with an image's height and width that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.images = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
                if tensor.shape[-2:] == (48, 48):
                    self.images = max(self.images, tensor.numel())
        return output


@pytest.mark.parametrize(("group", "chunk"), [(7, 2), (2, 2), (4, 1), (7, 7)])
def test_frames_are_floats_chunk_by_chunk(group: int, chunk: int) -> None:
    """No tensor of all frames in float, in any plan but the paper's; the largest float is of a chunk, too."""
    _, frozen = build_frozen(torch.float32, torch.float32, group, chunk)
    with LargestFloats() as seen:
        frozen(SEVEN)
    frame_elements = 6 * 48 * 48
    assert seen.images == chunk * frame_elements  # all seven, only in the last case
    weights = max(parameter.numel() for parameter in frozen.parameters())
    widest = chunk * 17 * 512
    assert seen.elements <= max(chunk * frame_elements, widest, weights)


def test_counts_and_the_line_in_the_log() -> None:
    tower, frozen = build_frozen(torch.bfloat16, torch.float32)
    model = nn.ModuleDict({"tower": frozen, "head": nn.Linear(10, 3)})
    elements = sum(parameter.numel() for parameter in tower.parameters())
    assert count_parameters(model) == (33, elements)
    optimizer = torch.optim.SGD(model["head"].parameters(), lr=0.1, momentum=0.9)
    assert (
        describe_frozen("tower", frozen, optimizer)
        == "froze tower: 906 k parameters, 1.73 MiB bf16, 0 B optimizer state"
    )
    wrong = torch.optim.AdamW(model.parameters())  # holds the tower too, and says so
    assert describe_frozen("tower", frozen, wrong).endswith(", 3.46 MiB optimizer state")
