"""Optimizers and the learning rate against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bigvivit.config import OptimConfig
from bigvivit.model.adapter import Adapter
from bigvivit.model.temporal import TemporalTransformer
from bigvivit.training.optim import build_optimizer, build_scheduler


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


def test_what_is_frozen_is_not_held() -> None:
    model = build_model()
    model["temporal"].requires_grad_(False)
    held = {id(p) for group in build_optimizer(model, OptimConfig()).param_groups for p in group["params"]}
    assert held == {id(p) for key in ("adapter", "head") for p in model[key].parameters()}
