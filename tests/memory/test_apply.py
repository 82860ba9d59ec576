"""The plan, applied: what is frozen, in which type, on which device, computed how."""

from __future__ import annotations

import pytest
import torch

from bigvivit.memory import apply
from bigvivit.memory.apply import apply_plan, compute_dtype, has_bf16_units
from bigvivit.memory.plan import MemoryPlan
from bigvivit.model.towers import build_tower
from bigvivit.model.vivit import ViViT, build_vivit
from bigvivit.model.weights import random_weights
from tests.model.reference import DEMO

CPU = torch.device("cpu")
CLIPS = torch.randint(256, (2, 8, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(plan: MemoryPlan, *, frozen: bool) -> ViViT:
    tower = build_tower(DEMO, tubelet=2, image_size=48, droplayer=0.5)
    model = build_vivit(
        tower,
        frames=8,
        tubelet=2,
        classes=5,
        temporal_depth=2,
        droplayer=0.0,
        temporal_input="centred",
        adapter=frozen,
        seed=0,
    )
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    apply_plan(model, plan, frozen=frozen, fill=random_weights(DEMO, 0), device=CPU)
    return model


def test_a_first_stage_trains_everything_in_fp32() -> None:
    model = build(MemoryPlan(storage="bf16"), frozen=False)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, True)}
    model.train()
    assert model.tower.training


def test_a_second_stage_freezes_the_tower_in_its_storage_type() -> None:
    model = build(MemoryPlan(storage="bf16"), frozen=True).train()
    tower = {(p.dtype, p.requires_grad) for p in model.tower.parameters()}
    rest = {(p.dtype, p.requires_grad) for name, p in model.named_parameters() if not name.startswith("tower.")}
    assert tower == {(torch.bfloat16, False)}
    assert rest == {(torch.float32, True)}
    model(CLIPS).sum().backward()
    assert all(p.grad is None for p in model.tower.parameters())
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("tower."))
    assert torch.equal(model(CLIPS), model(CLIPS))  # stochastic depth of a frozen tower is off, also in training


def test_frozen_in_fp32_gives_what_training_gave() -> None:
    trained = build(MemoryPlan(), frozen=False).eval()
    frozen = build(MemoryPlan(storage="fp32", compute="fp32"), frozen=True).eval()
    torch.testing.assert_close(frozen(CLIPS), trained(CLIPS), rtol=0, atol=1e-6)


def test_bf16_is_near_fp32_and_not_equal() -> None:
    exact = build(MemoryPlan(storage="fp32", compute="fp32"), frozen=True)(CLIPS)
    for compute in ("fp32", "bf16"):
        rough = build(MemoryPlan(storage="bf16", compute=compute), frozen=True)(CLIPS)
        difference = (rough - exact).abs().max() / exact.abs().max()
        assert 0 < difference < 0.05


def test_autocast_reaches_what_is_trained() -> None:
    logits = build(MemoryPlan(autocast="bf16"), frozen=True)(CLIPS)
    assert logits.dtype == torch.bfloat16
    assert build(MemoryPlan(autocast="auto"), frozen=True)(CLIPS).dtype == torch.float32


def test_compute_falls_back_to_fp32_without_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "has_bf16_units", lambda device: False)
    assert compute_dtype(MemoryPlan(), CPU) == torch.float32
    monkeypatch.setattr(apply, "has_bf16_units", lambda device: True)
    assert compute_dtype(MemoryPlan(), CPU) == torch.bfloat16
    assert compute_dtype(MemoryPlan(compute="fp16"), CPU) == torch.float16


@pytest.mark.parametrize(
    ("flags", "units"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
    ],
)
def test_bf16_units_of_a_processor(flags: dict, units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert has_bf16_units(CPU) is units
