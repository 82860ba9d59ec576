"""Towers by name: sizes without published weights, and those that are published.

Each row names where its dimensions come from. When weights are loaded, what their own config.json says counts; this
table is for planning, and for random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    Aimv2VisionConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    IJepaConfig,
    PretrainedConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTMAEConfig,
)


def size(
    kind: type[PretrainedConfig], layers: int, width: int, heads: int, patch: int, image: int = 224, **more: Any
) -> PretrainedConfig:
    """A configuration by its dimensions."""
    return kind(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=image,
        **more,
    )


SIZES: dict[str, PretrainedConfig] = {
    "vit-b": size(ViTConfig, 12, 768, 12, 16, intermediate_size=3072, layer_norm_eps=1e-6),
    "vit-l": size(ViTConfig, 24, 1024, 16, 16, intermediate_size=4096, layer_norm_eps=1e-6),
    "vit-h": size(ViTConfig, 32, 1280, 16, 14, intermediate_size=5120, layer_norm_eps=1e-6),
    "vit-g": size(ViTConfig, 40, 1408, 16, 14, intermediate_size=6144, layer_norm_eps=1e-6),
    "vit-demo": size(ViTConfig, 4, 128, 4, 12, image=48, intermediate_size=512, layer_norm_eps=1e-6),
}
"""Towers without published weights: the paper's sizes (§4, Table 5) and the demo's."""


@dataclass(frozen=True)
class Published:
    """A tower that its makers published."""

    config: PretrainedConfig
    source: str
    """Where its dimensions come from."""


CARD = "model card; not compared with its config.json"
HUB = "its config.json"
OPEN_CLIP = "its open_clip_config.json"
IJEPA = "transformers: convert_ijepa_to_hf.py"
DINOV3_SCRIPT = "transformers: convert_dinov3_vit_to_hf.py"
SWIGLU: dict[str, Any] = {"mlp_ratio": 4, "use_swiglu_ffn": True}
DINOV3: dict[str, Any] = {"num_register_tokens": 4, "use_gated_mlp": True, "key_bias": False, "hidden_act": "silu"}

PUBLISHED = {
    "google/vit-huge-patch14-224-in21k": Published(size(ViTConfig, 32, 1280, 16, 14, intermediate_size=5120), CARD),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": Published(
        size(CLIPVisionConfig, 32, 1280, 16, 14, intermediate_size=5120), HUB
    ),
    "laion/CLIP-ViT-g-14-laion2B-s12B-b42K": Published(
        size(CLIPVisionConfig, 40, 1408, 16, 14, intermediate_size=6144), CARD
    ),
    "laion/CLIP-ViT-g-14-laion2B-s34B-b88K": Published(
        size(CLIPVisionConfig, 40, 1408, 16, 14, intermediate_size=6144), OPEN_CLIP
    ),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": Published(
        size(CLIPVisionConfig, 48, 1664, 16, 14, intermediate_size=8192), OPEN_CLIP
    ),
    "Salesforce/blip2-opt-2.7b": Published(
        size(Blip2VisionConfig, 39, 1408, 16, 14, intermediate_size=6144), "transformers: Blip2VisionConfig (EVA-g)"
    ),
    "facebook/ijepa_vith14_1k": Published(size(IJepaConfig, 32, 1280, 16, 14, intermediate_size=5120), IJEPA),
    "facebook/ijepa_vith14_22k": Published(size(IJepaConfig, 32, 1280, 16, 14, intermediate_size=5120), IJEPA),
    "facebook/ijepa_vitg16_22k": Published(size(IJepaConfig, 40, 1408, 16, 16, intermediate_size=6144), IJEPA),
    "facebook/dinov2-giant": Published(size(Dinov2Config, 40, 1536, 24, 14, image=518, **SWIGLU), HUB),
    "facebook/dinov2-with-registers-giant": Published(
        size(Dinov2WithRegistersConfig, 40, 1536, 24, 14, image=518, num_register_tokens=4, **SWIGLU), CARD
    ),
    "facebook/webssl-dino1b-full2b-224": Published(
        size(Dinov2Config, 40, 1536, 24, 14, **SWIGLU), "as dinov2-giant; not compared with its config.json"
    ),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": Published(
        size(DINOv3ViTConfig, 32, 1280, 20, 16, intermediate_size=5120, **DINOV3), DINOV3_SCRIPT
    ),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": Published(
        size(DINOv3ViTConfig, 40, 4096, 32, 16, intermediate_size=8192, query_bias=False, value_bias=False, **DINOV3),
        DINOV3_SCRIPT,
    ),
    "google/siglip2-giant-opt-patch16-256": Published(
        size(SiglipVisionConfig, 40, 1536, 16, 16, image=256, intermediate_size=6144), CARD
    ),
    "google/siglip2-giant-opt-patch16-384": Published(
        size(SiglipVisionConfig, 40, 1536, 16, 16, image=384, intermediate_size=6144), CARD
    ),
    "facebook/vit-mae-huge": Published(size(ViTMAEConfig, 32, 1280, 16, 14, intermediate_size=5120), CARD),
    "apple/aimv2-huge-patch14-224": Published(size(Aimv2VisionConfig, 24, 1536, 12, 14, intermediate_size=4096), CARD),
    "apple/aimv2-1B-patch14-224": Published(size(Aimv2VisionConfig, 24, 2048, 16, 14, intermediate_size=5632), HUB),
    "apple/aimv2-3B-patch14-224": Published(size(Aimv2VisionConfig, 24, 3072, 24, 14, intermediate_size=8192), HUB),
}

TIMM = (
    "timm/eva_giant_patch14_clip_224.merged2b",
    "timm/eva02_large_patch14_448.mim_m38m_ft_in22k",
    "timm/eva02_enormous_patch14_clip_224.laion2b_plus",
    "timm/vit_base_r50_s16_224.orig_in21k",
    "timm/vit_large_r50_s32_224.augreg_in21k",
)
"""Published for timm, whose own registry says what they are; the last two begin with a ResNet."""
