"""Small towers of every family, and what Hugging Face's own model makes of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
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
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SMALL, intermediate_size=48, num_register_tokens=4)),
    "dinov3-swiglu": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(
            **SMALL, intermediate_size=48, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu",
            query_bias=False, key_bias=False, value_bias=False,
        )
    ),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, intermediate_size=48)),
    "ijepa": lambda: IJepaModel(IJepaConfig(**SMALL, intermediate_size=48)),
    "eva": lambda: Blip2VisionModel(Blip2VisionConfig(**SMALL, intermediate_size=48)),
    "mae": lambda: ViTMAEModel(ViTMAEConfig(**SMALL, intermediate_size=48, mask_ratio=0.0)),
    "aimv2": lambda: Aimv2VisionModel(Aimv2VisionConfig(**SMALL, intermediate_size=48, use_head=False)),
}  # fmt: skip
"""A model of every family, and of each kind of MLP."""
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
TIMM_MODELS: dict[str, dict[str, Any]] = {
    "eva_giant_patch14_224": {**TINY, "mlp_ratio": 2},
    "eva02_tiny_patch14_224": TINY,
    "eva02_large_patch14_clip_224": TINY,
    "eva02_enormous_patch14_clip_224": TINY,
    "vit_base_patch16_224": TINY,
    "vit_giant_patch14_reg4_dinov2": {**TINY, "mlp_ratio": 2},
    "vit_tiny_r_s16_p8_224": {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 4},
}
"""Architectures of timm, and what makes small ones of them: positions that are added, and rotary ones; one matrix for
queries, keys and values, and three; CLS and mean; norms before and behind; registers; the last begins with a ResNet."""
FIXED_SIZE = {"aimv2"}
"""Families whose Hugging Face code takes images of one size only."""


def save(model: PreTrainedModel, folder: Path, **options: object) -> PreTrainedModel:
    """Random values everywhere, so that no tensor left at zero or one can hide; then into `folder`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder, **options)
    return model.eval()


def load(spec: TowerSpec, fill: Fill, *, tubelet: int, image_size: int, patch_grid: int = 0) -> Tower:
    tower = build_tower(spec, tubelet=tubelet, image_size=image_size, droplayer=0.0, patch_grid=patch_grid)
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
    """What Hugging Face's model makes of uint8 images: the pooled token, the mean or CLS token of its last states."""
    output = run_model(model, spec, images)
    if isinstance(model, CLIPVisionModel | SiglipVisionModel):
        return output.pooler_output
    if isinstance(model, IJepaModel | Aimv2VisionModel):
        return output.last_hidden_state.mean(1)
    return output.last_hidden_state[:, 0]


def last_states(model: PreTrainedModel, spec: TowerSpec, images: Tensor) -> Tensor:
    """Every token of the last layer, normalised: CLIP alone leaves that to its pooled token."""
    states = run_model(model, spec, images).last_hidden_state
    return (
        getattr(model, "vision_model", model).post_layernorm(states) if isinstance(model, CLIPVisionModel) else states
    )


@torch.no_grad()
def run_model(model: PreTrainedModel, spec: TowerSpec, images: Tensor) -> Any:
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in (spec.mean, spec.std))
    by_itself = (Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, Aimv2VisionModel)
    options: dict[str, Any] = {} if isinstance(model, by_itself) else {"interpolate_pos_encoding": True}
    if isinstance(model, ViTMAEModel):  # it shuffles its patches by this
        patches = (images.shape[-1] // model.config.patch_size) ** 2
        options["noise"] = torch.arange(patches).expand(len(images), -1)
    return model(pixel_values=(images / 255 - mean) / std, **options)
