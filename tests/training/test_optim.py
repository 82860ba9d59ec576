"""Optimizers and the learning rate against their formulas."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bigvivit.config import ConfigError, OptimConfig
from bigvivit.model.adapter import Adapter
from bigvivit.model.temporal import TemporalTransformer
from bigvivit.model.towers import build_tower, resolve_tower
from bigvivit.training.optim import build_optimizer, build_scheduler
from tests.model.reference import MODELS, save


def build_model() -> nn.Module:
    temporal = TemporalTransformer(tubelets=4, width=8, heads=2, mlp=16, depth=1, droplayer=0.0, form="centred")
    return nn.ModuleDict({"adapter": Adapter(8), "temporal": temporal, "head": nn.Linear(8, 3)})


def test_the_cosine_after_a_linear_warm_up() -> None:
    config = OptimConfig(lr=0.4, epochs=5, warmup_epochs=1)
    optimizer = build_optimizer(build_model(), config)
    scheduler = build_scheduler(optimizer, config, steps_per_epoch=10)
    rates = []
    for _ in range(50):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    expected = [0.4 * step / 10 for step in range(10)]
    expected += [0.2 * (1 + math.cos(math.pi * step / 40)) for step in range(40)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(("epochs", "steps"), [(0.01, 1), (0.5, 4), (3.0, 21)])
def test_fractions_of_epochs(epochs: float, steps: int) -> None:
    assert OptimConfig(epochs=epochs, warmup_epochs=0).count_steps(7) == steps


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_decay_spares_biases_norms_and_tables(name: str, kind: type) -> None:
    model = build_model()
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.1))
    assert type(optimizer) is kind
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    decayed, exempt = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert sorted(decayed + exempt) == sorted(names.values())
    assert all(key.endswith(".weight") and "norm" not in key for key in decayed)
    assert {"temporal.cls_token", "temporal.position_embeddings", "head.bias"} <= set(exempt)


TABLES = re.compile(r"position|pos_embed|cls|class_embedding|token|probe|lambda|norm|bias|gamma")
"""How towers of every family call what no decay is for, collected by looking at them."""


@pytest.mark.parametrize("name", MODELS)
def test_decay_spares_every_table_of_every_family(name: str, tmp_path: Path) -> None:
    """By name, CLIP's, SigLIP's, AIMv2's and EVA's positions and SigLIP's probe had been missed."""
    save(MODELS[name](), tmp_path)
    tower = build_tower(resolve_tower(str(tmp_path), random=True), tubelet=1, image_size=32, droplayer=0.0)
    optimizer = build_optimizer(nn.ModuleDict({"tower": tower}), OptimConfig(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    wrong = [key for key, p in tower.named_parameters() if (id(p) in decayed) == bool(TABLES.search(key))]
    assert wrong == []


def test_rates_by_part_and_by_layer() -> None:
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    tower = nn.ModuleDict({"embed": nn.Linear(2, 2), "layers": layers, "pool": nn.LayerNorm(2)})
    model = nn.ModuleDict({"tower": tower, "temporal": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    config = OptimConfig(lr=1.0, tower_lr=0.1, head_lr=2.0, layer_decay=0.5, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters() if "bias" not in name}
    assert found == {
        "tower.embed.weight": pytest.approx(0.1 * 0.5**4),
        "tower.layers.0.weight": pytest.approx(0.1 * 0.5**3),
        "tower.layers.1.weight": pytest.approx(0.1 * 0.5**2),
        "tower.layers.2.weight": pytest.approx(0.1 * 0.5),
        "tower.pool.weight": pytest.approx(0.1),
        "temporal.weight": 1.0,
        "head.weight": 2.0,
    }
    scheduler = build_scheduler(optimizer, replace(config, steps=10, warmup_steps=2), steps_per_epoch=1)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5 * rate for rate in scheduler.base_lrs]


@pytest.mark.parametrize(
    ("settings", "steps", "warmup"),
    [({"steps": 30}, 30, 2), ({"steps": 30, "warmup_steps": 5}, 30, 5), ({"epochs": 4, "warmup_epochs": 1}, 28, 7)],
)
def test_lengths_in_steps_or_epochs(settings: dict[str, Any], steps: int, warmup: int) -> None:
    config = OptimConfig(**settings)
    assert (config.count_steps(7), config.count_warmup(7)) == (steps, warmup)


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps=40 leaves nothing of the run's 14 steps"):
        OptimConfig(epochs=2, warmup_epochs=1, warmup_steps=40).count_warmup(7)


def test_what_is_frozen_is_not_held() -> None:
    model = build_model()
    model["temporal"].requires_grad_(False)
    held = {id(p) for group in build_optimizer(model, OptimConfig()).param_groups for p in group["params"]}
    assert held == {id(p) for key in ("adapter", "head") for p in model[key].parameters()}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_optimizer_does_the_same(name: Any) -> None:
    ends = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.01, weight_decay=0.1, fused=fused))
        assert bool(optimizer.defaults["fused"]) == fused
        for _ in range(3):
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1])
    with pytest.raises(ConfigError, match="leave it out"):
        OptimConfig(name=f"{name}8bit", fused=True)  # type: ignore[arg-type]
