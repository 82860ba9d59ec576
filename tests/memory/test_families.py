"""Towers of every family in both stages, with stochastic depth: two ranks of ZeRO-3 and FSDP2 against two of DDP."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Sequential
from transformers import TimmWrapperConfig

from bigvivit.memory.apply import apply_plan
from bigvivit.memory.freeze import freeze
from bigvivit.memory.plan import MemoryPlan, Stream
from bigvivit.memory.quantize import CODES
from bigvivit.memory.stream import FrozenTower
from bigvivit.model.families import FAMILIES
from bigvivit.model.towers import build_tower, resolve_tower
from bigvivit.model.weights import open_weights, random_weights
from tests.memory.rounding import round_to
from tests.memory.walk import Cell, losses
from tests.model.reference import MODELS, TIMM_MODELS, draw_images, load, save


def test_no_family_is_left_out(tmp_path: Path) -> None:
    families: list[type] = []
    for name, build_model in MODELS.items():
        build_model().config.save_pretrained(tmp_path / name)
    for name, arguments in TIMM_MODELS.items():
        TimmWrapperConfig(architecture=name, model_args=arguments).save_pretrained(tmp_path / name)
    for folder in tmp_path.iterdir():
        families.append(resolve_tower(str(folder), random=True).family.model)
    assert [name for name, family in FAMILIES.items() if family.model not in families] == []


@pytest.mark.parametrize(("group", "chunk"), [(7, 7), (7, 3), (2, 2), (4, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_tower_is_the_tower(name: str, group: int, chunk: int, tmp_path: Path) -> None:
    save(MODELS[name](), tmp_path)
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, 2), tubelet=2, image_size=32)
    freeze(tower)
    images = draw_images(7, 6, 32)
    expected = tower(images)
    frozen = FrozenTower(tower, torch.float32, torch.device("cpu"), lambda *sizes: Stream(group, chunk, "test"))
    torch.testing.assert_close(frozen(images), expected, rtol=1e-6, atol=1e-6)


def keep_as(model: torch.nn.Module, storage: str) -> None:
    """Round every weight as its form does: codes for the matrices of linear layers, bf16 for all else."""
    matrices = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(round_to(weight, storage if name in matrices else "bf16"))


@pytest.mark.parametrize("name", ["eva_giant_patch14_224", "vit_tiny_r_s16_p8_224"])
def test_a_tower_from_timm_in_every_form(name: str, tmp_path: Path) -> None:
    """Its matrices become codes, its buffers come along, and where they live changes nothing."""
    TimmWrapperConfig(architecture=name, model_args=TIMM_MODELS[name]).save_pretrained(tmp_path)
    spec, size = resolve_tower(str(tmp_path), random=True), TIMM_MODELS[name]["img_size"]
    images, fill = draw_images(5, 3, size), random_weights(spec, 0)

    def build(**plan: Any) -> Any:
        model = Sequential(OrderedDict(tower=build_tower(spec, tubelet=1, image_size=size, droplayer=0.0)))
        plan = MemoryPlan(compute="fp32", **plan)
        apply_plan(model, plan, frozen=True, fill=fill, device=torch.device("cpu"), scratch=tmp_path)
        return model

    exact = build(storage="fp32", chunk=2)(images)
    for storage in ("bf16", "int8", "nf4"):
        here = build(storage=storage, chunk=2)(images)
        model = build(storage="fp32")
        keep_as(model, storage)
        torch.testing.assert_close(here, model(images), rtol=1e-4, atol=1e-4, msg=storage)
        assert (here - exact).abs().max() > 2e-3, storage  # so that equality means something
        for placement in ("cpu", "disk"):
            there = build(storage=storage, placement=placement, chunk=2)
            assert torch.equal(there(images), here)
            codes = [slot.name for slot in there.tower.layers[0].slots if slot.name.endswith(CODES)]
            assert len(codes) == (0 if storage == "bf16" else 4)  # qkv, proj, fc1, fc2


FROM_TIMM: dict[str, tuple[int, ...]] = {
    "eva02_tiny_patch14_224": (1, 2),
    "eva_giant_patch14_224": (2,),
    "vit_tiny_r_s16_p8_224": (1, 2),
}
"""Of timm's, with the stages: rotary positions, buffers in layers, a ResNet before them."""
DIFFERENT = {"dinov3-swiglu", "siglip", "aimv2", "registers", "eva", *FROM_TIMM}
"""Trained whole, in stage 1, under every engine; test_towers.py shows for all that each weight gets a gradient."""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    folder = tmp_path_factory.mktemp("towers")
    found: list[Cell] = []
    for name, build in MODELS.items():
        build().config.save_pretrained(folder / name)
        stages = (1, 2) if name in DIFFERENT else (2,)
        found += [{"stage": stage, "tower": str(folder / name), "image": 32} for stage in stages]
    for name, stages in FROM_TIMM.items():
        TimmWrapperConfig(architecture=name, model_args=TIMM_MODELS[name]).save_pretrained(folder / name)
        size, tubelet = TIMM_MODELS[name]["img_size"], 1 if "_r_" in name else 2
        found += [{"stage": n, "tower": str(folder / name), "image": size, "tubelet": tubelet} for n in stages]
    return found


@pytest.mark.parametrize("some", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_every_family_is_sharded(engine: str, some: bool, cells: list[Cell]) -> None:
    wrong = []
    walked = [cell for cell in cells if not some or (cell["stage"] == 2 and Path(cell["tower"]).name in DIFFERENT)]
    for cell, own, plain in zip(walked, losses(engine, walked), losses("ddp", walked), strict=True):
        if own != pytest.approx(plain, abs=1e-4) or abs(own[-1] - own[0]) < 1e-3:
            wrong.append(f"{cell}: {own}, not {plain}")
    assert not wrong, "\n".join(wrong)
