"""Transfer between models, against NumPy's interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bigvivit.model.towers import build_tower
from bigvivit.model.transfer import Skipped, interpolate_positions, transfer
from bigvivit.model.vivit import ViViT, build_vivit
from tests.model.reference import DEMO


@pytest.mark.parametrize(("old", "new"), [(4, 64), (4, 16), (16, 4), (5, 5), (4, 1), (1, 8)])
def test_positions_keep_cls_and_interpolate_the_rest_end_on_end(old: int, new: int) -> None:
    table = np.random.default_rng(0).normal(size=(1, 1 + old, 6)).astype(np.float32)
    at = np.linspace(0, old - 1, new)
    expected = np.stack([np.interp(at, np.arange(old), table[0, 1:, column]) for column in range(6)], axis=1)
    result = interpolate_positions(torch.from_numpy(table), new)
    np.testing.assert_array_equal(result[:, :1], table[:, :1])
    np.testing.assert_allclose(result[0, 1:], expected, rtol=0, atol=1e-6)


def build(*, frames: int, adapter: bool, seed: int, classes: int = 8, depth: int = 2) -> ViViT:
    tower = build_tower(DEMO, tubelet=2, image_size=48, droplayer=0.0)
    return build_vivit(
        tower,
        frames=frames,
        tubelet=2,
        classes=classes,
        temporal_depth=depth,
        droplayer=0,
        temporal_input="centred",
        adapter=adapter,
        seed=seed,
    )


def trained_parts(model: ViViT) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if not name.startswith("tower.")}


def test_stage_1_to_stage_2() -> None:
    stage1, stage2 = build(frames=8, adapter=False, seed=1), build(frames=32, adapter=True, seed=2)
    with torch.no_grad():
        stage1.head.weight.normal_()
    source, target = trained_parts(stage1), trained_parts(stage2)
    skipped = transfer(target, source)
    assert {entry.name.split(".")[0] for entry in skipped} == {"adapter"}
    assert len(skipped) == 4
    for name, tensor in source.items():
        if name != "temporal.position_embeddings":
            assert torch.equal(target[name], tensor), name
    table = source["temporal.position_embeddings"]
    assert torch.equal(target["temporal.position_embeddings"], interpolate_positions(table, 16))


def test_every_tensor_without_a_counterpart_is_listed() -> None:
    target = trained_parts(build(frames=8, adapter=False, seed=1, classes=5, depth=1))
    source = trained_parts(build(frames=8, adapter=True, seed=2, classes=8, depth=2))
    before = target["head.weight"].clone()
    skipped = transfer(target, source)
    assert Skipped("head.weight", "shape [8, 128] in the source, [5, 128] here: keeps its initial value") in skipped
    assert Skipped("adapter.fc1.bias", "has no counterpart here") in skipped
    assert {e.name for e in skipped} == {
        name
        for name in source.keys() | target.keys()
        if name not in target or name not in source or name.startswith("head")
    }
    assert torch.equal(target["head.weight"], before)
