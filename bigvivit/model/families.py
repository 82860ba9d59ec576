"""Families of image towers in transformers: where each keeps its parts, and what makes a frame's vector.

The modules are Hugging Face's own; what is ours is the order in which they are called.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import (
    Aimv2VisionModel,
    Blip2VisionModel,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    IJepaModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    TimmWrapperModel,
    ViTConfig,
    ViTModel,
)

from bigvivit.model.timm_towers import MODEL_TYPE, complete, is_timm

RGB = tuple[float, float, float]
HALF: RGB = (0.5, 0.5, 0.5)
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
OPENAI_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: RGB = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of a tower stand in a Hugging Face model, by their dotted names."""

    model: type[PreTrainedModel]
    """Of a tower from timm, what opens it in transformers; `timm_towers.py` takes timm's own model apart."""
    embed: tuple[str, ...] = ("embeddings",)
    """Called one after the other on the pixels."""
    layers: str = "layers"
    norm: str = "layernorm"
    """Applied to the last hidden states."""
    vector: Literal["CLS", "mean", "pooler"] = "CLS"
    """What stands for the frame: the first token, the mean of all tokens, or what `pooler` makes of them."""
    pooler: str | None = None
    mean: RGB
    std: RGB
    """Normalisation the family was trained with; what the files beside the weights say comes first."""
    preprocessor_is_wrong: RGB | None = None
    """Mean, and deviation, that a conversion script wrote without asking the model."""
    rotary: str | None = None
    """Computes rotary positions from the pixels' size; every layer gets them."""
    resizes: bool = True
    """Whether Hugging Face's code interpolates positions to other image sizes."""
    fp16_safe: bool | None = None
    """CLIP is published in fp16 and BLIP-2 runs its tower so; DINOv3 reportedly overflows; None where nobody says."""
    model_options: dict[str, Any] = field(default_factory=dict)
    embed_options: dict[str, Any] = field(default_factory=dict)
    layer_options: dict[str, Any] = field(default_factory=dict)
    """What every layer has to be called with."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the configuration that differ from the published ones: parts that only pre-training uses."""


INTERPOLATE = {"interpolate_pos_encoding": True}  # DINOv2 does so by itself
UNMASKED = {"attention_mask": None}

FAMILIES = {
    "vit": Family(
        model=ViTModel, mean=HALF, std=HALF, model_options={"add_pooling_layer": False}, embed_options=INTERPOLATE
    ),
    # The encoder's own class would draw and shuffle patches; its weights are those of a ViT.
    "vit_mae": Family(
        model=ViTModel,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        model_options={"add_pooling_layer": False},
        embed_options=INTERPOLATE,
    ),
    "ijepa": Family(
        model=IJepaModel,
        vector="mean",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        preprocessor_is_wrong=HALF,
        embed_options=INTERPOLATE,
    ),
    "clip_vision_model": Family(
        model=CLIPVisionModel,
        embed=("embeddings", "pre_layrnorm"),
        layers="encoder.layers",
        norm="post_layernorm",
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
        fp16_safe=True,
        embed_options=INTERPOLATE,
        layer_options=UNMASKED,
    ),
    "siglip_vision_model": Family(
        model=SiglipVisionModel,
        layers="encoder.layers",
        norm="post_layernorm",
        vector="pooler",
        pooler="head",
        mean=HALF,
        std=HALF,
        embed_options=INTERPOLATE,
        layer_options=UNMASKED,
        settings={"vision_use_head": True},
    ),
    "blip_2_vision_model": Family(
        model=Blip2VisionModel,
        layers="encoder.layers",
        norm="post_layernorm",
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
        fp16_safe=True,
        embed_options=INTERPOLATE,
    ),
    "dinov2": Family(
        model=Dinov2Model,
        layers="encoder.layer",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        settings={"use_mask_token": False, "drop_path_rate": 0.0},  # stochastic depth is ours
    ),
    "dinov2_with_registers": Family(
        model=Dinov2WithRegistersModel,
        layers="encoder.layer",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        settings={"drop_path_rate": 0.0},
    ),
    "dinov3_vit": Family(
        model=DINOv3ViTModel,
        layers="model.layer",
        norm="norm",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        rotary="rope_embeddings",
        fp16_safe=False,
        settings={"drop_path_rate": 0.0},
    ),
    "aimv2_vision_model": Family(
        model=Aimv2VisionModel,
        layers="encoder.layers",
        norm="rms_norm",
        vector="mean",
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
        resizes=False,
        settings={"use_head": False},
    ),
    MODEL_TYPE: Family(model=TimmWrapperModel, norm="norm", vector="pooler", pooler="pooler", mean=HALF, std=HALF),
}
"""By `model_type` of the configuration."""


def adapt_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration that the family's model is built from. Raises ValueError for one of timm's that is no tower."""
    if is_timm(config):
        return complete(config)
    if config.model_type != "vit_mae":
        return config
    known = ViTConfig().to_dict().keys() - {"model_type", "architectures"}
    adapted = ViTConfig(**{name: value for name, value in config.to_dict().items() if name in known})
    adapted.trained_as = "vit_mae"  # its normalisation is not a ViT's
    return adapted


def family_of(config: PretrainedConfig) -> Family:
    """The family of a configuration that `adapt_config` gave."""
    return FAMILIES[getattr(config, "trained_as", config.model_type)]
