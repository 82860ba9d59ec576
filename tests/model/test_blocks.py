"""Stochastic depth against its definition, and initial weights against theirs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, Dinov2Config, ViTConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
from transformers.models.vit.modeling_vit import ViTLayer

from bigvivit.model.blocks import StochasticDepth, apply_stochastic_depth, init_weights, residual_branches

SIZE = {"hidden_size": 8, "num_attention_heads": 2, "attn_implementation": "sdpa"}
LAYERS = {
    "vit": lambda: ViTLayer(ViTConfig(**SIZE, intermediate_size=16)),
    "clip": lambda: CLIPEncoderLayer(CLIPVisionConfig(**SIZE, intermediate_size=16)),
    "dinov2": lambda: Dinov2Layer(Dinov2Config(**SIZE, mlp_ratio=2)),
}


def reference_block(x: np.ndarray, keep: np.ndarray, branches: list) -> np.ndarray:
    """x plus each kept branch of what came before, not divided by any rate. keep [2, b] of 0 and 1."""
    for kept, branch in zip(keep, branches, strict=True):
        x = x + kept[:, None, None] * branch(x)
    return x


@pytest.mark.parametrize("family", LAYERS)
def test_a_layer_with_dropped_branches(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = LAYERS[family]().train()
    x = torch.randn(6, 5, 8)
    keep = np.array([[1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 1, 0]], np.float32)
    norms = [part for part in layer.modules() if isinstance(part, nn.LayerNorm)]
    scales = [getattr(layer, name, nn.Identity()) for name in ("layer_scale1", "layer_scale2")]
    attention, mlp = residual_branches(layer)

    def run(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda value: function(torch.from_numpy(value)).detach().numpy()

    def attend(value: torch.Tensor) -> torch.Tensor:
        attended = attention(norms[0](value))
        return scales[0](attended[0] if isinstance(attended, tuple) else attended)

    branches = [run(attend), run(lambda v: scales[1](mlp(norms[1](v))))]
    expected = reference_block(x.numpy(), keep, branches)

    apply_stochastic_depth(nn.ModuleList([nn.Identity(), layer]), 0.3)  # the deepest: dropped at the full rate
    draws = iter(keep)
    monkeypatch.setattr(torch, "rand", lambda shape, device: torch.from_numpy(next(draws)).view(shape))
    with torch.no_grad():
        masks = {"attention_mask": None} if family == "clip" else {}
        np.testing.assert_allclose(layer(x, **masks).numpy(), expected, rtol=0, atol=1e-6)


def test_rates_grow_linearly_from_zero() -> None:
    layers = nn.ModuleList(LAYERS["vit"]() for _ in range(5))
    apply_stochastic_depth(layers, 0.4)
    rates = [
        [hook.rate for hook in branch._forward_hooks.values()]
        for layer in layers
        for branch in residual_branches(layer)
    ]
    assert rates[:2] == [[], []]
    np.testing.assert_allclose(rates[2:], np.repeat([0.1, 0.2, 0.3, 0.4], 2)[:, None])


def test_branches_are_dropped_per_example_at_the_rate_and_only_in_training() -> None:
    torch.manual_seed(0)
    branch = nn.Identity()
    branch.register_forward_hook(StochasticDepth(0.3))
    ones = torch.ones(20_000, 2, 3)
    output = branch.train()(ones)
    assert set(output.flatten().tolist()) == {0.0, 1.0}  # never divided by the rate of keeping
    assert torch.equal(output.amin((1, 2)), output.amax((1, 2)))
    assert output[:, 0, 0].mean().item() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / 20_000))
    assert torch.equal(branch.eval()(ones), ones)


def test_initial_weights() -> None:
    layer = nn.ModuleDict({"layer": LAYERS["dinov2"](), "conv": nn.Conv2d(6, 64, 8), "table": nn.Embedding(50, 64)})
    init_weights(layer, 3, "name", layer_scale=0.25)
    fc1 = layer["layer"].mlp.fc1
    bound = math.sqrt(6 / (8 + 16))
    assert fc1.weight.abs().max() <= bound
    assert fc1.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert not fc1.bias.any()
    assert torch.equal(layer["layer"].layer_scale1.lambda1, torch.full((8,), 0.25))
    assert torch.equal(layer["layer"].norm1.weight, torch.ones(8))
    assert layer["conv"].weight.std().item() == pytest.approx(math.sqrt(1 / (6 * 64)), rel=0.1)
    assert layer["table"].weight.std().item() == pytest.approx(0.02, rel=0.1)
