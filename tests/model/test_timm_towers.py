"""Towers from timm against timm's own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import AutoModel

from bigvivit.memory.freeze import freeze
from bigvivit.memory.plan import Stream
from bigvivit.memory.stream import FrozenTower
from bigvivit.model import timm_towers
from bigvivit.model.towers import TowerSpec, build_tower, resolve_tower
from bigvivit.model.weights import finish_tower, kernel_name, open_weights, random_weights, write_piece
from tests.model.reference import TIMM_MODELS, draw_images, load

HYBRID = "vit_tiny_r_s16_p8_224"
IMAGES = [name for name in TIMM_MODELS if name != HYBRID]


def save(name: str, folder: Path) -> nn.Module:
    """A small model with random values everywhere, in the format of timm's hub."""
    model: nn.Module = timm.create_model(name, num_classes=0, dynamic_img_size=True, **TIMM_MODELS[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_for_hf(model, folder, model_args=TIMM_MODELS[name], safe_serialization=True)
    return model.eval()


def vectors(model: nn.Module, spec: TowerSpec, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in (spec.mean, spec.std))
    with torch.no_grad():
        output: Tensor = model((images / 255 - mean) / std)
    return output


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_stages_give_what_timm_gives(name: str, tmp_path: Path) -> None:
    """At the size it was made for, and at a larger one, whose positions are interpolated."""
    model = save(name, tmp_path)
    spec = resolve_tower(str(tmp_path))
    size = TIMM_MODELS[name]["img_size"]
    tower = load(spec, open_weights(spec, tmp_path, 1), tubelet=1, image_size=size)
    for images in draw_images(2, 3, size), draw_images(2, 3, size + spec.config.patch_size):
        assert (tower(images) - vectors(model, spec, images)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_a_streamed_tower_is_the_tower(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    spec = resolve_tower(str(tmp_path))
    size = TIMM_MODELS[name]["img_size"]
    tower = load(spec, open_weights(spec, tmp_path, 1), tubelet=1, image_size=size)
    freeze(tower)
    images = draw_images(5, 3, size)
    expected = tower(images)
    frozen = FrozenTower(tower, torch.float32, torch.device("cpu"), lambda *sizes: Stream(4, 2, "test"))
    torch.testing.assert_close(frozen(images), expected, rtol=1e-6, atol=1e-6)
    frozen = FrozenTower(tower, torch.bfloat16, torch.device("cpu"), lambda *sizes: Stream(4, 2, "test"))
    assert frozen(images).dtype == torch.bfloat16


@pytest.mark.parametrize("name", IMAGES)
def test_an_inflated_tower_sees_the_central_frame(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, 2), tubelet=2, image_size=32)
    images = draw_images(2, 6, 32)
    torch.testing.assert_close(tower(images), vectors(model, spec, images[:, 3:]), rtol=0, atol=1e-5)


def test_a_hybrid_takes_single_frames() -> None:
    spec = resolve_tower("timm/vit_base_r50_s16_224.orig_in21k", random=True)
    with pytest.raises(ValueError, match=r"model\.tubelet=2: vit_base_r50_s16_224\S* begins .* --model\.tubelet 1"):
        build_tower(spec, tubelet=2, image_size=224, droplayer=0.0)


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_every_weight_gets_a_gradient_and_branches_are_dropped(name: str, tmp_path: Path) -> None:
    config = timm_towers.read_timm_config({"architecture": name, "model_args": TIMM_MODELS[name]})
    config.save_pretrained(tmp_path)
    spec = resolve_tower(str(tmp_path), random=True)
    size, tubelet = TIMM_MODELS[name]["img_size"], 1 if name == HYBRID else 2
    tower = build_tower(spec, tubelet=tubelet, image_size=size, droplayer=0.9)
    for piece, module in tower.pieces():
        module.to_empty(device="cpu")
        random_weights(spec, 0)(piece, module)
    images = draw_images(4, 3 * tubelet, size)
    tower.eval()
    assert torch.equal(tower(images), tower(images))
    tower.train()
    assert not torch.equal(tower(images), tower(images))
    tower.train()(images).square().sum().backward()
    whole = build_tower(spec, tubelet=tubelet, image_size=size, droplayer=0.0)
    assert [key for key, parameter in tower.named_parameters() if parameter.grad is None] == []
    assert tower.state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_a_dropped_branch_adds_nothing(name: str, tmp_path: Path) -> None:
    """Not even the bias of a norm behind it. The deepest layer drops both at the full rate."""
    save(name, tmp_path)
    spec, size = resolve_tower(str(tmp_path)), TIMM_MODELS[name]["img_size"]
    tower = build_tower(spec, tubelet=1, image_size=size, droplayer=1.0)
    for piece, module in tower.pieces():
        module.to_empty(device="cpu")
        open_weights(spec, tmp_path, 1)(piece, module)
    hidden, extras = tower.train().embed(draw_images(2, 3, size))
    assert torch.equal(tower.layers[-1](hidden, **extras), hidden)
    assert not torch.allclose(tower.layers[-1].eval()(hidden, **extras), hidden)


@pytest.mark.parametrize("name", IMAGES)
def test_a_trained_tower_opens_again_here_and_in_transformers(name: str, tmp_path: Path) -> None:
    """As stage 1 leaves it: over tubelets, which to others are images of six channels."""
    save(name, tmp_path / "published")
    spec = resolve_tower(str(tmp_path / "published"))
    tower = load(spec, open_weights(spec, tmp_path / "published", 2), tubelet=2, image_size=32)
    for piece, module in tower.pieces():
        write_piece(tmp_path / "trained", spec, piece, module.state_dict())
    finish_tower(tmp_path / "trained", spec, 2)
    images = draw_images(2, 6, 32)
    again = resolve_tower(str(tmp_path / "trained"))
    assert (again.mean, again.std) == (spec.mean, spec.std)
    copy = load(again, open_weights(again, tmp_path / "trained", 2), tubelet=2, image_size=32)
    assert torch.equal(copy(images), tower(images))
    model = AutoModel.from_pretrained(tmp_path / "trained").eval()
    mean, std = (torch.tensor(rgb * 2).view(6, 1, 1) for rgb in (spec.mean, spec.std))
    with torch.no_grad():
        theirs = model(pixel_values=(images / 255 - mean) / std).pooler_output
    torch.testing.assert_close(theirs, tower(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_model", r"is no tower of timm's \(Unknown model"),
        ("resnet18", "give one of timm's Eva and VisionTransformer"),
        ("deit_base_distilled_patch16_224", "is a VisionTransformerDistilled"),
        ("vit_so400m_patch14_siglip_224", "pools by attention"),
        ("vit_base_patch16_xp_224", "is one of ParallelScalingBlocks"),
        ("vit_base_patch16_rope_mixed_224", "whose layers differ"),
        ("vit_base_mci_224", "running statistics"),
    ],
)
def test_what_is_no_tower_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        resolve_tower(f"timm/{name}", random=True)


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ({"architecture": 3}, "config.json of tower .* cannot be read"),
        ({"model_args": {"embed_dim": "wide"}}, "is no tower of timm's"),
        ({"model_args": {"wings": 2}}, "is no tower of timm's .*wings"),
        ({"pretrained_cfg": {"mean": [0, 1]}}, "config.json gives no mean and deviation of three colours"),
        ({"pretrained_cfg": {"std": 1}}, "config.json gives no mean and deviation of three colours"),
    ],
)
def test_a_damaged_description_is_one_error(described: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224", **described}))
    with pytest.raises(ValueError, match=reason):
        resolve_tower(str(tmp_path))


@pytest.mark.slow
def test_all_that_timm_knows_is_a_tower_or_is_refused() -> None:
    """Each architecture of its files of transformers: one frame vector of the right width, or one message."""
    towers = refused = 0
    files = ("eva", "vision_transformer", "vision_transformer_hybrid", "deit", "beit")
    names = [name for file in files for name in timm.list_models(module=file)]
    for name in names:
        try:
            spec = resolve_tower(f"timm/{name}", random=True)
            size = spec.config.image_size // spec.config.patch_size * spec.config.patch_size
            tower = build_tower(spec, tubelet=1 if spec.config.hybrid else 2, image_size=size, droplayer=0.1)
        except ValueError as error:
            refused += name in str(error)
            continue
        assert spec.config.hybrid or kernel_name(spec, 2)
        images = torch.empty(2, 3 if spec.config.hybrid else 6, size, size, dtype=torch.uint8, device="meta")
        hidden, extras = tower.embed(images)
        hidden = tower.layers[0](hidden, **{key: table.to("meta") for key, table in extras.items()})
        assert tower.pool(hidden).shape == (2, spec.width), name
        towers += 1
    print(f"{towers} towers, {refused} refused, of {len(names)}")
    assert towers + refused == len(names)
    assert towers > 200
    assert refused > 20


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: Any = timm_towers.importlib.util.find_spec
    monkeypatch.setattr(timm_towers.importlib.util, "find_spec", lambda name: None if name == "timm" else found(name))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "eva_giant_patch14_224"}))
    for name, random in (("timm/eva_giant_patch14_224", True), (str(tmp_path), False)):
        with pytest.raises(ValueError, match=r'needs timm: pip install "bigvivit\[timm\]"'):
            resolve_tower(name, random=random)
