"""Weights of towers: from files of every age, at random, and back to a folder Hugging Face reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from bigvivit.model.towers import Tower, TowerSpec, build_tower, resolve_tower
from bigvivit.model.weights import (
    fetch_weights,
    finish_tower,
    open_weights,
    random_weights,
    tower_checksum,
    weight_files,
    write_piece,
)
from tests.model.reference import DEMO, MODELS, SMALL, draw_images, frame_vectors, load, save


def test_a_classifier_of_the_hub(tmp_path: Path) -> None:
    """Its names are the old ones, with a prefix, beside a head that a tower has no use for."""
    model = save(ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=48)), tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert "vit.encoder.layer.0.attention.attention.query.weight" in keys
    assert "classifier.weight" in keys
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, 1), tubelet=1, image_size=32)
    images = draw_images(2, 3, 32)
    torch.testing.assert_close(tower(images), frame_vectors(model.vit, spec, images), rtol=0, atol=1e-5)


def test_the_image_half_of_clip(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    vision = {**SMALL, "intermediate_size": 48}
    model = save(CLIPModel(CLIPConfig(text_config=text, vision_config=vision)), tmp_path)
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, 1), tubelet=1, image_size=32)
    images = draw_images(2, 3, 32)
    torch.testing.assert_close(tower(images), frame_vectors(model.vision_model, spec, images), rtol=0, atol=1e-5)


def test_swiglu_as_facebook_published_it(tmp_path: Path) -> None:
    """dinov2-giant stores the two input matrices of its MLP as one."""
    model = save(Dinov2Model(Dinov2Config(**SMALL, use_swiglu_ffn=True)), tmp_path)
    assert any("mlp.weights_in" in key for key in load_file(tmp_path / "model.safetensors"))
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, 1), tubelet=1, image_size=32)
    loaded, expected = (dict(mlp.named_parameters()) for mlp in (tower.layers[2].mlp, model.encoder.layer[2].mlp))
    assert len(expected) in (4, 6)  # by the version of transformers: one matrix, or two
    torch.testing.assert_close(loaded, expected)


def test_several_files_and_another_type(tmp_path: Path) -> None:
    model = save(MODELS["vit"]().half(), tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 2
    spec = resolve_tower(str(tmp_path))
    tower = load(spec, open_weights(spec, tmp_path, 1), tubelet=1, image_size=32)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    images = draw_images(2, 3, 32)
    torch.testing.assert_close(tower(images), frame_vectors(model.float(), spec, images), rtol=0, atol=1e-5)


def test_what_is_missing_or_misshapen_is_named(tmp_path: Path) -> None:
    save(MODELS["vit"](), tmp_path)
    spec = resolve_tower(str(tmp_path))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    gone = next(key for key in tensors if "layer.1" in key and key.endswith("query.bias"))
    del tensors[gone]
    tensors["layernorm.weight"] = torch.ones(5)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"layers\.1\.attention\.q_proj\.bias is missing; layernorm\.weight is \[5\], not \[32\]"
    ):
        open_weights(spec, tmp_path, 1)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    save(MODELS["vit"](), tmp_path)
    spec = resolve_tower(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        open_weights(spec, tmp_path, 1)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save(MODELS["vit"](), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"read a pytorch_model\.bin with --model\.allow-pickle"):
        fetch_weights(resolve_tower(str(tmp_path)))


def test_a_size_has_no_weights_to_fetch() -> None:
    with pytest.raises(
        ValueError, match=r"vit-demo is a size without published weights: add --model\.tower-init random"
    ):
        fetch_weights(DEMO)


def test_random_weights_depend_on_seed_and_piece_only() -> None:
    def draw(seed: int, *, backwards: bool) -> dict[str, Tensor]:
        tower = build_tower(DEMO, tubelet=2, image_size=48, droplayer=0.0)
        fill = random_weights(DEMO, seed)
        pieces = tower.pieces()
        for name, piece in reversed(pieces) if backwards else pieces:
            piece.to_empty(device="cpu")
            torch.rand(3)  # the global generator must not matter
            fill(name, piece)
        return dict(tower.named_parameters())

    tower = build_tower(DEMO, tubelet=2, image_size=48, droplayer=0.0)
    tower.embed.bfloat16().to_empty(device="cpu")
    random_weights(DEMO, 0)("embed", tower.embed)
    rounded = tower.embed.embeddings.position_embeddings

    first, second, other = draw(0, backwards=False), draw(0, backwards=True), draw(1, backwards=False)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(first["embed.embeddings.position_embeddings"].bfloat16(), rounded)
    assert not torch.equal(first["layers.0.mlp.fc1.weight"], other["layers.0.mlp.fc1.weight"])
    assert not torch.equal(first["layers.0.mlp.fc1.weight"], first["layers.1.mlp.fc1.weight"])
    assert all(torch.isfinite(parameter).all() for parameter in first.values())


def write(tower: Tower, spec: TowerSpec, folder: Path, tubelet: int) -> None:
    for name, piece in tower.pieces():
        write_piece(folder, spec, name, {key: p.detach() for key, p in piece.named_parameters()})
    finish_tower(folder, spec, tubelet)


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_tower_is_read_back(name: str, tmp_path: Path) -> None:
    save(MODELS[name](), tmp_path / "image")
    spec = resolve_tower(str(tmp_path / "image"))
    trained = load(spec, open_weights(spec, tmp_path / "image", 2), tubelet=2, image_size=32)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # now no frame of a tubelet is blind
    write(trained, spec, tmp_path / "tower", 2)
    again = resolve_tower(str(tmp_path / "tower"))
    assert (again.mean, again.std) == (spec.mean, spec.std)
    tower = load(again, open_weights(again, tmp_path / "tower", 2), tubelet=2, image_size=32)
    images = draw_images(2, 6, 32)
    assert torch.equal(tower(images), trained(images))
    with pytest.raises(ValueError, match=r"model\.tubelet=4: .*is \[32, 6, 8, 8\], not \[32, 12, 8, 8\]"):
        open_weights(again, tmp_path / "tower", 4)


def test_hugging_face_reads_a_trained_tower(tmp_path: Path) -> None:
    """As a model of six-channel images, by its own loader."""
    tower = load(DEMO, random_weights(DEMO, 0), tubelet=2, image_size=48)
    write(tower, DEMO, tmp_path, 2)
    model, report = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    images = draw_images(2, 6, 48)
    with torch.no_grad():
        expected = model.eval()((images / 255 - 0.5) / 0.5).last_hidden_state[:, 0]
    torch.testing.assert_close(tower(images), expected, rtol=0, atol=1e-5)


def test_the_checksum_changes_with_the_weights_only(tmp_path: Path) -> None:
    tower = load(DEMO, random_weights(DEMO, 0), tubelet=2, image_size=48)
    write(tower, DEMO, tmp_path, 2)
    before = tower_checksum(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text())))
    assert tower_checksum(tmp_path) == before
    with torch.no_grad():
        tower.pool.layernorm.bias[3] += 1
    write(tower, DEMO, tmp_path, 2)
    assert tower_checksum(tmp_path) != before


def test_a_model_of_the_hub_from_its_cache(tmp_path: Path) -> None:
    """A hub id goes the hub's way: here to its local cache, laid out as the hub lays it out, without a network."""
    repository = tmp_path / "models--lab--tower"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save(MODELS["dinov2"](), snapshot)
    code = (
        "import torch\n"
        "from bigvivit.model.towers import build_tower, resolve_tower\n"
        "from bigvivit.model.weights import fetch_weights, open_weights\n"
        "spec = resolve_tower('lab/tower')\n"
        "fill = open_weights(spec, fetch_weights(spec), 1)\n"
        "piece = build_tower(spec, tubelet=1, image_size=32, droplayer=0.0).layers[2].to_empty(device='cpu')\n"
        "fill('layers.2', piece)\n"
        "print(float(piece.mlp.fc1.weight.sum()))\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    stored = load_file(snapshot / "model.safetensors")["encoder.layer.2.mlp.fc1.weight"]
    assert float(done.stdout) == pytest.approx(float(stored.sum()))
