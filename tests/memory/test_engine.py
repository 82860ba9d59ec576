"""The plain engine against a training loop written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bigvivit.config import OptimConfig
from bigvivit.memory.engine import PlainEngine
from bigvivit.training.optim import build_optimizer, build_scheduler
from bigvivit.training.step import train_step


class Toy(nn.Module):
    """Mean colour to three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.temporal, self.head = nn.Identity(), nn.Linear(3, 3)

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.temporal(clips.float().mean((1, 3, 4)) / 255))


def batches(count: int, size: int) -> list[SimpleNamespace]:
    generator = torch.Generator().manual_seed(0)
    return [
        SimpleNamespace(
            clips=torch.randint(256, (size, 2, 3, 4, 4), dtype=torch.uint8, generator=generator),
            labels=torch.randint(3, (size,), generator=generator),
            indices=torch.arange(size),
        )
        for _ in range(count)
    ]


def build_engine(optim: OptimConfig, steps_per_epoch: int) -> PlainEngine:
    torch.manual_seed(0)
    model = Toy()
    optimizer = build_optimizer(model, optim)
    return PlainEngine(
        model,
        optimizer,
        build_scheduler(optimizer, optim, steps_per_epoch),
        device=torch.device("cpu"),
        accumulate=optim.accumulate,
        clip_norm=optim.clip_norm,
    )


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_three_steps_of_sgd_by_hand(clip_norm: float) -> None:
    """Momentum, cosine after warm-up, clipping and accumulation, each from its formula."""
    optim = OptimConfig(
        lr=0.5, batch_size=8, accumulate=2, epochs=3, warmup_epochs=1, clip_norm=clip_norm, label_smoothing=0.1
    )
    engine = build_engine(optim, steps_per_epoch=1)
    model = Toy()
    model.load_state_dict(engine.module.state_dict())
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    data = batches(6, 4)
    for step, lr in enumerate([0.0, 0.5, 0.25]):  # warm-up over one step, then a cosine over two
        pair = data[2 * step : 2 * step + 2]
        result = train_step(engine, pair, label_smoothing=0.1)
        clips, labels = torch.cat([b.clips for b in pair]), torch.cat([b.labels for b in pair])
        targets = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
        loss = -(targets * model(clips).log_softmax(-1)).sum(-1).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        scale = min(1.0, clip_norm / (float(norm) + 1e-6)) if clip_norm else 1.0
        with torch.no_grad():
            for parameter, gradient, v in zip(model.parameters(), gradients, velocity, strict=True):
                v.mul_(0.9).add_(gradient * scale)
                parameter.sub_(lr * v)
        assert result.loss.item() == pytest.approx(loss.item(), abs=1e-6)
        assert result.grad_norm == pytest.approx(norm.item(), abs=1e-6)
    for ours, expected in zip(engine.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_between_updates_nothing_moves() -> None:
    engine = build_engine(OptimConfig(lr=0.5, batch_size=8, accumulate=2, epochs=3, warmup_epochs=0), 4)
    before = engine.module.head.weight.clone()
    (batch,) = batches(1, 4)
    engine.backward(engine(batch.clips).sum())
    assert engine.step() is None
    assert torch.equal(engine.module.head.weight, before)
    engine.backward(engine(batch.clips).sum())
    assert engine.step() is not None
    assert not torch.equal(engine.module.head.weight, before)


def test_gather_names_and_copies_what_is_there() -> None:
    engine = build_engine(OptimConfig(), 1)
    state = engine.gather(engine.module.head)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {"weight": (3, 3), "bias": (3,)}
    assert not any(tensor.requires_grad for tensor in state.values())
