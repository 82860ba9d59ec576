"""A frozen tower in one type, computing in another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bigvivit.memory.freeze import count_parameters, describe_frozen, freeze
from bigvivit.memory.stream import FrozenTower
from bigvivit.model.towers import Tower
from bigvivit.model.weights import random_weights
from tests.model.reference import DEMO, draw_images, load


def build_frozen(storage: torch.dtype, compute: torch.dtype) -> tuple[Tower, FrozenTower]:
    tower = load(DEMO, random_weights(DEMO, 0), tubelet=2, image_size=48).to(storage)
    freeze(tower)
    return tower, FrozenTower(tower, compute)


IMAGES = draw_images(3, 6, 48)


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


def test_only_one_layer_is_cast_at_a_time() -> None:
    """Bytes the CPU allocator handed out and not yet taken back, by its own count, never hold two cast layers."""
    _, frozen = build_frozen(torch.bfloat16, torch.float32)
    one_layer = sum(p.numel() * 4 for p in frozen.layers[0].parameters())
    whole = sum(p.numel() * 4 for p in frozen.parameters())
    image = draw_images(1, 6, 48)
    with torch.profiler.profile(profile_memory=True) as profile:
        frozen(image)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert one_layer < peak < 2 * one_layer < whole


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
