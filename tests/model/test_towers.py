"""Towers against Hugging Face's own models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Model, ResNetConfig, ResNetModel

from bigvivit.model.catalog import PUBLISHED, SIZES
from bigvivit.model.towers import TowerSpec, build_tower, resolve_tower
from bigvivit.model.weights import open_weights
from tests.model.reference import DEMO, FIXED_SIZE, MODELS, draw_images, frame_vectors, last_states, load, save


@pytest.mark.parametrize("image_size", [32, 48])
@pytest.mark.parametrize("name", MODELS)
def test_stages_give_what_the_hugging_face_model_gives(name: str, image_size: int, tmp_path: Path) -> None:
    if name in FIXED_SIZE and image_size != 32:
        pytest.skip("Hugging Face's own code takes images of one size only; ours refuses others (below)")
    model = save(MODELS[name](), tmp_path)
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, 1), tubelet=1, image_size=image_size)
    images = draw_images(2, 3, image_size)
    difference = (tower(images) - frame_vectors(model, spec, images)).abs().max()
    assert difference <= 1e-5


@pytest.mark.parametrize(("tubelet", "central"), [(2, 1), (3, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_an_inflated_tower_sees_the_central_frame(name: str, tubelet: int, central: int, tmp_path: Path) -> None:
    model = save(MODELS[name](), tmp_path)
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, tubelet), tubelet=tubelet, image_size=32)
    images = draw_images(2, 3 * tubelet, 32)
    frame = images[:, 3 * central : 3 * central + 3]
    torch.testing.assert_close(tower(images), frame_vectors(model, spec, frame), rtol=0, atol=1e-5)


def test_pieces_hold_every_parameter_once() -> None:
    tower = build_tower(DEMO, tubelet=2, image_size=48, droplayer=0.0)
    names = [name for name, _ in tower.pieces()]
    held = [id(parameter) for _, piece in tower.pieces() for parameter in piece.parameters()]
    assert names == ["embed", "layers.0", "layers.1", "layers.2", "layers.3", "pool"]
    assert sorted(held) == sorted(id(parameter) for parameter in tower.parameters())


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "mlp"),
    [
        ("vit-b", 12, 768, 12, 3072),
        ("vit-l", 24, 1024, 16, 4096),
        ("vit-h", 32, 1280, 16, 5120),
        ("vit-g", 40, 1408, 16, 6144),
    ],
)
def test_sizes_of_the_paper(name: str, layers: int, width: int, heads: int, mlp: int) -> None:
    spec = resolve_tower(name)
    tower = build_tower(spec, tubelet=2, image_size=224, droplayer=0.0)
    assert (len(tower.layers), spec.width, spec.heads, spec.mlp) == (layers, width, heads, mlp)
    patches = (224 // SIZES[name].patch_size) ** 2
    per_layer = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    embed = width * 6 * SIZES[name].patch_size ** 2 + width + width * (patches + 2)
    assert sum(parameter.numel() for parameter in tower.parameters()) == layers * per_layer + embed + 2 * width


def test_attention_runs_through_sdpa(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(MODELS["clip"](), tmp_path)
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, 1), tubelet=1, image_size=32)
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **options: calls.append(1) or attention(*args, **options),
    )
    tower(draw_images(1, 3, 32))
    assert len(calls) == len(tower.layers)


def test_normalisation_is_the_models_own(tmp_path: Path) -> None:
    save(MODELS["dinov2"](), tmp_path)
    assert resolve_tower(str(tmp_path)).mean == (0.485, 0.456, 0.406)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    spec = resolve_tower(str(tmp_path))
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_size_that_patches_do_not_tile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clip.size=50 .* 12 pixels; try 48 or 60"):
        build_tower(DEMO, tubelet=2, image_size=50, droplayer=0.0)


def test_unknown_towers_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a folder with a config.json"):
        resolve_tower(str(tmp_path / "nothing"))
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'resnet'; bigvivit knows vit, vit_mae, ijepa, clip_vision_model"):
        resolve_tower(str(tmp_path))


def test_a_real_pretrained_tower(shared: Callable[[str], Path]) -> None:
    folder = shared("models/dinov2-small")
    model = Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
    spec = resolve_tower(str(folder))
    tower = load(spec, open_weights(spec, folder, 1), tubelet=1, image_size=224)
    images = draw_images(2, 3, 224)
    difference = (tower(images) - frame_vectors(model, spec, images)).abs().max()
    assert difference <= 1e-5


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_a_family_without_interpolation_says_so(name: str, tmp_path: Path) -> None:
    save(MODELS[name](), tmp_path)
    with pytest.raises(ValueError, match=r"clip\.size=48: .* no way of interpolating them; give --clip\.size 32"):
        build_tower(resolve_tower(str(tmp_path)), tubelet=1, image_size=48, droplayer=0.0)


@pytest.mark.parametrize("grid", [4, 2])
@pytest.mark.parametrize("name", MODELS)
def test_patches_beside_the_vector(name: str, grid: int, tmp_path: Path) -> None:
    """Against Hugging Face's last hidden states, cell by cell."""
    model = save(MODELS[name](), tmp_path)
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, 1), tubelet=1, image_size=32, patch_grid=grid)
    images = draw_images(2, 3, 32)
    output = tower(images)
    assert output.shape == (2, (1 + grid**2) * spec.width)
    torch.testing.assert_close(output[:, : spec.width], frame_vectors(model, spec, images), rtol=1e-4, atol=1e-5)
    rows = last_states(model, spec, images)[:, -16:].view(2, 4, 4, -1)
    step = 4 // grid
    for row, column in itertools.product(range(grid), repeat=2):
        cell = rows[:, row * step : (row + 1) * step, column * step : (column + 1) * step].mean((1, 2))
        start = (1 + row * grid + column) * spec.width
        torch.testing.assert_close(output[:, start : start + spec.width], cell, rtol=1e-4, atol=1e-5)


def test_a_grid_finer_than_the_patches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"patch_grid=5: an image of 48 pixels has 4 patches"):
        build_tower(resolve_tower("vit-demo"), tubelet=2, image_size=48, droplayer=0.0, patch_grid=5)


def test_rotary_positions_are_not_drawn_while_training(tmp_path: Path) -> None:
    """Hugging Face's model shifts and scales them in train mode; a tower gives the same twice, and as in eval mode."""
    save(MODELS["dinov3"](), tmp_path)
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, 1), tubelet=1, image_size=32)
    images = draw_images(2, 3, 32)
    expected = tower(images)
    assert torch.equal(tower.train()(images), expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_a_tower_gets_a_gradient(name: str, tmp_path: Path) -> None:
    """DDP and ZeRO wait for each: mask tokens, which only pre-training uses, must be gone."""
    save(MODELS[name](), tmp_path)
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, 2), tubelet=2, image_size=32).train()
    tower(draw_images(2, 6, 32)).square().sum().backward()
    assert [key for key, parameter in tower.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", MODELS)
def test_a_dropped_branch_adds_nothing(name: str, tmp_path: Path) -> None:
    """The deepest layer drops both of its branches at the full rate."""
    save(MODELS[name](), tmp_path)
    spec = resolve_tower(str(tmp_path))
    tower = build_tower(spec, tubelet=1, image_size=32, droplayer=1.0)
    for piece, module in tower.pieces():
        module.to_empty(device="cpu")
        open_weights(spec, tmp_path, 1)(piece, module)
    hidden, extras = tower.train().embed(draw_images(2, 3, 32))
    assert torch.equal(tower.layers[-1](hidden, **extras), hidden)
    assert not torch.allclose(tower.layers[-1].eval()(hidden, **extras), hidden)


def test_a_preprocessor_that_a_script_left_at_its_default(tmp_path: Path) -> None:
    save(MODELS["ijepa"](), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    assert resolve_tower(str(tmp_path)).mean == (0.485, 0.456, 0.406)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.4], "image_std": [0.5, 0.5, 0.5]}')
    assert resolve_tower(str(tmp_path)).mean == (0.5, 0.5, 0.4)


@pytest.mark.parametrize(
    ("name", "billions"),
    [  # what their makers say
        ("laion/CLIP-ViT-g-14-laion2B-s34B-b88K", 1.01),
        ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", 1.84),
        ("facebook/dinov2-giant", 1.14),
        ("facebook/dinov3-vith16plus-pretrain-lvd1689m", 0.84),
        ("facebook/dinov3-vit7b16-pretrain-lvd1689m", 6.72),
        ("google/siglip2-giant-opt-patch16-256", 1.16),
        ("apple/aimv2-1B-patch14-224", 1.23),
    ],
)
def test_published_towers_have_the_size_their_makers_say(name: str, billions: float) -> None:
    spec = resolve_tower(name, random=True)
    tower = build_tower(spec, tubelet=1, image_size=spec.config.image_size, droplayer=0.0)
    assert sum(parameter.numel() for parameter in tower.parameters()) / 1e9 == pytest.approx(billions, rel=0.02)


def test_every_published_tower_can_be_built() -> None:
    for name in PUBLISHED:
        spec = resolve_tower(name, random=True)
        assert isinstance(spec, TowerSpec)
        assert len(build_tower(spec, tubelet=2, image_size=spec.config.image_size, droplayer=0.1).layers) >= 24
