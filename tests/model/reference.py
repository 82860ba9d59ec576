"""Small towers of every family, and what Hugging Face's own model makes of an image."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from bigvivit.model.towers import Tower, TowerSpec, build_tower, resolve_tower
from bigvivit.model.weights import Fill

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
DEMO = resolve_tower("vit-demo")
MODELS = {
    "vit": lambda: ViTModel(ViTConfig(**SMALL, intermediate_size=48), add_pooling_layer=False),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL, intermediate_size=48)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2, layerscale_value=0.5)),
    "dinov2-swiglu": lambda: Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2, use_swiglu_ffn=True)),
}


def save(model: PreTrainedModel, folder: Path, **options: object) -> PreTrainedModel:
    """Random values everywhere, so that no tensor left at zero or one can hide; then into `folder`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder, **options)
    return model.eval()


def load(spec: TowerSpec, fill: Fill, *, tubelet: int, image_size: int) -> Tower:
    tower = build_tower(spec, tubelet=tubelet, image_size=image_size, droplayer=0.0)
    assert {parameter.device.type for parameter in tower.parameters()} == {"meta"}
    for name, piece in tower.pieces():
        piece.to_empty(device="cpu")
        fill(name, piece)
    return tower.eval()


def draw_images(count: int, channels: int, size: int) -> Tensor:
    return torch.randint(
        256, (count, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def frame_vectors(model: PreTrainedModel, spec: TowerSpec, images: Tensor) -> Tensor:
    """What Hugging Face's model gives for uint8 images: CLIP's pooled token, else the CLS token of the last state."""
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in (spec.mean, spec.std))
    options = {} if isinstance(model, Dinov2Model) else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        output = model(pixel_values=(images / 255 - mean) / std, **options)
    return output.pooler_output if isinstance(model, CLIPVisionModel) else output.last_hidden_state[:, 0]
