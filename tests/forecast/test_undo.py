"""A trace leaves nothing behind: programs train on as if it had not been."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigvivit.config import ConfigError
from bigvivit.forecast import trace_step
from bigvivit.forecast.undo import undone

Parts = tuple[Callable[[], float], nn.Module, torch.optim.Optimizer | None]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def plain(make: Callable[[Any], torch.optim.Optimizer], model: nn.Module | None = None) -> Parts:
    model = net() if model is None else model
    optimizer = make(model.parameters())
    x = torch.ones(4, 8)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step, model, optimizer


def scheduled() -> Parts:
    inner, model, optimizer = plain(lambda p: torch.optim.SGD(p, 0.1))
    assert optimizer is not None
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)

    def step() -> float:
        loss = inner()
        scheduler.step()
        return loss

    return step, model, optimizer


class Counting(nn.Module):
    """Assigns buffers and attributes in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.places = net(), None
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.places is None:
            self.places = torch.arange(4.0)
        y = self.inner(x)
        self.mean = 0.9 * self.mean + y.detach().mean(0)
        return y + self.places * self.mean


def scaled() -> Parts:
    model = net()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    x = torch.ones(4, 8)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return float(loss.detach())

    return step, model, optimizer


def left_out() -> Parts:
    """A weight and its optimizer that the trace is not told of, and a list that grows."""
    inner, model, optimizer = plain(lambda p: torch.optim.SGD(p, 0.1))
    extra = nn.Parameter(torch.ones(4))
    other = torch.optim.Adam([extra], 0.1)
    losses: list[Tensor] = []

    def step() -> float:
        other.zero_grad()
        loss = extra.square().sum()
        loss.backward()
        other.step()
        losses.append(loss.detach())
        return inner() + float(sum(losses))

    return step, model, optimizer


PROGRAMS: dict[str, Callable[[], Parts]] = {
    "adamw": lambda: plain(torch.optim.AdamW),
    "momentum": lambda: plain(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "rmsprop": lambda: plain(torch.optim.RMSprop),
    "nadam": lambda: plain(torch.optim.NAdam),
    "adagrad": lambda: plain(torch.optim.Adagrad),
    "scheduler": scheduled,
    "buffers made in the forward": lambda: plain(torch.optim.AdamW, Counting()),
    "gradient scaler": scaled,
    "what the trace is not told of": left_out,
}


@pytest.mark.parametrize("warm", [0, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_losses_after_a_trace_are_those_without_one(name: str, warm: int) -> None:
    losses = []
    for traced in (False, True):
        step, model, optimizer = PROGRAMS[name]()
        for _ in range(warm):
            step()
        if traced:
            trace_step(step, modules=model, optimizer=optimizer)
        losses.append([step() for _ in range(4)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 1


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), ZeroDivisionError("by zero")])
def test_an_error_of_the_step_comes_out_and_modules_are_given_back(error: BaseException) -> None:
    model, x = net(), torch.ones(4, 8)
    before = model(x).detach()

    def step() -> None:
        y = model(x)
        y.sum()
        raise error

    with pytest.raises(type(error)) as caught:
        trace_step(step, modules=model)
    assert "raise error" in str(caught.value.__cause__)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert torch.equal(model(x), before)


def test_what_the_step_keeps_does_not_hold_modules() -> None:
    model, x = net(), torch.ones(4, 8)
    kept: dict[str, Any] = {}

    def step() -> None:
        kept["y"] = model(x)

    trace_step(step, modules=model)
    assert kept == {}
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_values_that_are_asked_for_and_missing_say_so_with_locals_around() -> None:
    model, x = net(), torch.ones(4, 8)

    def step() -> None:
        y = model(x)
        y.masked_select(y > 0).sum().backward()

    with pytest.raises(ConfigError, match="depends on values"):
        trace_step(step, modules=model)
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_a_trace_keeps_no_model_alive() -> None:
    step, model, optimizer = plain(torch.optim.AdamW)
    trace = trace_step(step, modules=model, optimizer=optimizer)
    gone = weakref.ref(model)
    del step, model, optimizer
    gc.collect()
    assert gone() is None
    assert trace.peak_bytes() > 0


COUNT = 0


def test_variables_of_functions_and_modules_are_put_back() -> None:
    total, names, seen = 0, {"a"}, [1]

    def step() -> None:
        nonlocal total
        global COUNT  # noqa: PLW0603 (what is tested)
        total += 1
        COUNT += 1
        names.add("b")
        seen.append(2)

    with undone(step):
        step()
        assert (total, COUNT, names, seen) == (1, 1, {"a", "b"}, [1, 2])
    assert (total, COUNT, names, seen) == (0, 0, {"a"}, [1])
