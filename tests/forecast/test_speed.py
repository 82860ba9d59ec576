"""The roofline, by hand and against torch's own count of operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from bigvivit.config import ConfigError
from bigvivit.forecast import trace_step
from bigvivit.forecast.hardware import accelerator_by_hand, find_accelerator
from bigvivit.forecast.speed import Work, forecast_seconds
from bigvivit.units import GiB


def make_program() -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Conv1d(5, 9, 3), layer, nn.Linear(32, 7)), torch.ones(3, 5, 34)


def test_operations_are_those_that_torch_counts_on_real_tensors() -> None:
    model, x = make_program()
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    # Before 2.15 torch has no formula for what attention calls on a CPU: 2 products forward, 5 backward, of
    # [3, 4, 9, 9] by 8.
    known = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in flop_registry
    attention = 0 if known else 7 * 2 * 3 * 4 * 9 * 9 * 8
    trace = trace_step(lambda: model(x).sum().backward(), modules=model, steps=1)
    assert trace.flops == counter.get_total_flops() + attention


def test_products_bind_where_weights_are_there() -> None:
    card = find_accelerator("2080 Ti")
    seconds = forecast_seconds(Work(flops=10**12, rate="fp16"), card)
    assert seconds["step"] == seconds["products"]
    assert seconds["products"][0] == pytest.approx(1e12 / (0.6 * 53.8e12))
    assert seconds["step"][0] < seconds["step"][1] < seconds["step"][2]


def test_the_host_link_binds_where_weights_come_over_it() -> None:
    card = find_accelerator("2080 Ti")
    seconds = forecast_seconds(Work(flops=10**9, rate="fp16", tower_bytes=16 * 10**9, fetches=1), card)
    assert seconds["host"][1] == pytest.approx(1 / 0.7)
    assert seconds["step"][1] == seconds["host"][1]
    assert seconds["step"][2] == pytest.approx(sum(seconds[part][2] for part in ("products", "memory", "host", "link")))


def test_ranks_talk() -> None:
    card = find_accelerator("A100 80GB")
    alone, ddp, sharded = (
        forecast_seconds(
            Work(flops=1, rate="bf16", trained_bytes=10**9, tower_bytes=10**9, fetches=int(s), ranks=r, sharded=s), card
        )["link"][1]
        for r, s in ((1, False), (8, False), (8, True))
    )
    assert alone == 0
    assert ddp == pytest.approx(7 / 8 * 2e9 / (0.7 * 300e9))
    assert sharded == pytest.approx(7 / 8 * 4e9 / (0.7 * 300e9))


def test_what_the_table_has_no_rate_of_is_refused() -> None:
    with pytest.raises(ConfigError, match="rate in bf16 of RTX 2080 Ti is not in the table"):
        forecast_seconds(Work(flops=1, rate="bf16"), find_accelerator("2080 Ti"))
    with pytest.raises(ConfigError, match="bandwidth of given by hand"):
        forecast_seconds(Work(flops=0, rate="fp16", trained_bytes=1), accelerator_by_hand(GiB))
