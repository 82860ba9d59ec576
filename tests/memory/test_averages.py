"""Moving averages of weights, against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch

from bigvivit.config import OptimConfig
from bigvivit.memory.engine import PlainEngine
from bigvivit.training.optim import build_optimizer, build_scheduler
from bigvivit.training.state import restore_scheduler, scheduler_state
from bigvivit.training.step import train_step
from tests.memory.test_engine import Toy, batches

STEPS = 6


def build(name: str = "adamw", ema: float = 0.7) -> PlainEngine:
    optim = OptimConfig(name=name, lr=0.05, batch_size=4, steps=STEPS, warmup_steps=0, ema=ema)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = Toy()
    optimizer = build_optimizer(model, optim)
    scheduler = build_scheduler(optimizer, optim, steps_per_epoch=STEPS)
    return PlainEngine(
        model, optimizer, scheduler, device=torch.device("cpu"), accumulate=1, clip_norm=0.0, ema=optim.ema
    )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_average_against_its_formula(name: str) -> None:
    engine = build(name)
    expected: dict[str, torch.Tensor] = {}
    for step, batch in enumerate(batches(STEPS, 4), start=1):
        train_step(engine, [batch])
        decay = min(0.7, (1 + step) / (10 + step))
        for key, value in engine.module.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value if key in expected else value.clone()
    weights = copy.deepcopy(engine.module.state_dict())
    with engine.averaged():
        torch.testing.assert_close(dict(engine.module.state_dict()), expected)
        assert not torch.equal(engine.module.state_dict()["head.weight"], weights["head.weight"])
    torch.testing.assert_close(dict(engine.module.state_dict()), dict(weights), rtol=0, atol=0)


def test_training_is_the_same_with_and_without() -> None:
    with_, without = build(), build(ema=0.0)
    for batch in batches(STEPS, 4):
        assert torch.equal(train_step(with_, [batch]).loss, train_step(without, [batch]).loss)


def test_a_resumed_run_has_the_same_averages() -> None:
    """A checkpoint's model holds the averages, its optimizer the weights."""
    left, resumed = build(), build()
    data = batches(STEPS, 4)
    for batch in data[:3]:
        train_step(left, [batch])
    with left.averaged():
        model, state = copy.deepcopy(left.module.state_dict()), copy.deepcopy(left.gather_optimizer())
    resumed.module.load_state_dict(model)
    resumed.load_optimizer(state)
    restore_scheduler(resumed.scheduler, scheduler_state(left.scheduler))
    for batch in data[3:]:
        assert torch.equal(train_step(left, [batch]).loss, train_step(resumed, [batch]).loss)
    with left.averaged(), resumed.averaged():
        for own, other in zip(left.module.parameters(), resumed.module.parameters(), strict=True):
            assert torch.equal(own, other)


def test_an_error_leaves_the_weights_in_place() -> None:
    engine = build()
    for batch in batches(2, 4):
        train_step(engine, [batch])
    weights = copy.deepcopy(engine.module.state_dict())
    with pytest.raises(RuntimeError, match="stop"), engine.averaged():
        raise RuntimeError("stop")
    assert torch.equal(engine.module.state_dict()["head.weight"], weights["head.weight"])
