"""How much a reversed clip changes what leaves the temporal transformer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigvivit.training.order import BLIND, describe_order, measure_order


class Engine:
    """One whose temporal part is given."""

    def __init__(self, temporal: nn.Module) -> None:
        self.module = nn.ModuleDict({"temporal": temporal})

    def __call__(self, clips: Tensor) -> Tensor:
        return self.module["temporal"](clips.float())[:, :0]  # the head starts at zero and says nothing


class Weighted(nn.Module):
    """The mean of a clip's frames, and so much of their weighting in time."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, clips: Tensor) -> Tensor:
        times = torch.linspace(-1, 1, clips.shape[1])
        return clips.mean(1) + self.share * (clips * times[:, None]).mean(1)


def batches(count: int, size: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [SimpleNamespace(clips=torch.randn(size, 6, 5, generator=generator)) for _ in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_the_change_by_its_formula(share: float) -> None:
    data = batches(2, 3)
    change = measure_order(Engine(Weighted(share)), data)  # type: ignore[arg-type]
    clips = torch.cat([batch.clips for batch in data])
    ordered, reversed_ = Weighted(share)(clips), Weighted(share)(clips.flip(1))
    pairs = [(ordered[i] - ordered[j]).norm() for i in range(6) for j in range(i)]
    assert change == pytest.approx(
        float((ordered - reversed_).norm(dim=1).mean() / torch.stack(pairs).mean()), abs=1e-6
    )
    assert describe_order(change).startswith("warning: ") == (share < 0.1)


def test_one_clip_cannot_be_compared() -> None:
    change = measure_order(Engine(Weighted(1.0)), batches(1, 1))  # type: ignore[arg-type]
    assert change is None
    assert "not measured" in describe_order(change)


def test_clips_that_do_not_differ() -> None:
    """One of a repeated frame looks like all others of its kind once its mean is off: 0, and not 0 / 0."""
    still = [SimpleNamespace(clips=torch.zeros(3, 6, 5))]
    change = measure_order(Engine(Weighted(1.0)), still)  # type: ignore[arg-type]
    assert change == 0
    assert "of one repeated frame" in describe_order(change)
    same = [SimpleNamespace(clips=batches(1, 1)[0].clips.expand(3, -1, -1))]
    assert measure_order(Engine(Weighted(1.0)), same) is None  # type: ignore[arg-type]


def test_the_model_is_as_before() -> None:
    engine = Engine(nn.Sequential(Weighted(1.0), nn.Dropout()))
    engine.module.train()
    state = torch.get_rng_state()
    measure_order(engine, batches(1, 2))  # type: ignore[arg-type]
    assert engine.module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not engine.module["temporal"]._forward_hooks


def test_the_warning_says_what_to_change() -> None:
    assert "--model.temporal-input" in describe_order(BLIND / 2)
    assert "warning" not in describe_order(BLIND)
