"""The table of Hugging Face image towers, and one of them as embed → layers → pool.

The modules are Hugging Face's own; what is ours is the order in which they are called. A tower is built without
weights, on the meta device; `model/weights.py` brings them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from bigvivit.model.blocks import apply_stochastic_depth

RGB = tuple[float, float, float]
HALF: RGB = (0.5, 0.5, 0.5)
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
OPENAI_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: RGB = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Family:
    """Where the parts of a tower stand in a Hugging Face model, by their dotted names."""

    model: type[PreTrainedModel]
    embed: tuple[str, ...]
    """Called one after the other on the pixels."""
    layers: str
    norm: str
    """Applied to the CLS token, which is the frame's vector."""
    mean: RGB
    std: RGB
    """Normalisation the family was trained with; a preprocessor_config.json beside the weights comes first."""
    model_options: dict[str, Any] = field(default_factory=dict)
    embed_options: dict[str, Any] = field(default_factory=dict)


INTERPOLATE = {"interpolate_pos_encoding": True}  # DINOv2 does so by itself

FAMILIES = {
    "vit": Family(
        ViTModel, ("embeddings",), "layers", "layernorm", HALF, HALF, {"add_pooling_layer": False}, INTERPOLATE
    ),
    "clip_vision_model": Family(
        CLIPVisionModel,
        ("embeddings", "pre_layrnorm"),
        "encoder.layers",
        "post_layernorm",
        OPENAI_MEAN,
        OPENAI_STD,
        embed_options=INTERPOLATE,
    ),
    "dinov2": Family(Dinov2Model, ("embeddings",), "encoder.layer", "layernorm", IMAGENET_MEAN, IMAGENET_STD),
}
"""By `model_type` of the configuration."""


def vit_size(layers: int, width: int, heads: int, mlp: int, patch: int, image: int = 224) -> ViTConfig:
    """A ViT by its dimensions."""
    return ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=mlp,
        patch_size=patch,
        image_size=image,
        layer_norm_eps=1e-6,
    )


SIZES = {
    "vit-b": vit_size(12, 768, 12, 3072, 16),
    "vit-l": vit_size(24, 1024, 16, 4096, 16),
    "vit-h": vit_size(32, 1280, 16, 5120, 14),
    "vit-g": vit_size(40, 1408, 16, 6144, 14),
    "vit-demo": vit_size(4, 128, 4, 512, 12, image=48),
}
"""Towers without published weights: the paper's sizes (§4, Table 5) and the demo's."""


@dataclass(frozen=True)
class TowerSpec:
    """Everything about a tower but its weights."""

    name: str
    """As the user gave it: a name of SIZES, a local folder or a hub id."""
    config: PretrainedConfig
    """The image model's configuration, of three channels."""
    mean: RGB
    std: RGB

    @property
    def family(self) -> Family:
        """Where its parts are."""
        return FAMILIES[self.config.model_type]

    @property
    def width(self) -> int:
        """Elements of a frame's vector."""
        return int(self.config.hidden_size)

    @property
    def heads(self) -> int:
        """Attention heads of each layer."""
        return int(self.config.num_attention_heads)

    @property
    def mlp(self) -> int:
        """Width of each layer's MLP; for DINOv2 before its SwiGLU takes two thirds of it."""
        if isinstance(self.config, Dinov2Config):
            return int(self.config.hidden_size * self.config.mlp_ratio)
        return int(self.config.intermediate_size)


def resolve_tower(name: str) -> TowerSpec:
    """The tower of this name; reads its configuration, not its weights.

    Raises ValueError for a name that is neither a size, a folder nor an id the hub knows, and for a model that is no
    tower of FAMILIES.
    """
    if name in SIZES:
        return TowerSpec(name, SIZES[name], HALF, HALF)
    looks_local = Path(name).exists() or name.startswith(("/", "./", "../"))
    if looks_local and not (Path(name) / "config.json").is_file():
        raise ValueError(f"tower {name} is not a folder with a config.json: give a model in Hugging Face format")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"tower {name!r} is neither one of {', '.join(SIZES)}, nor a local folder, nor a model that the "
            f"Hugging Face hub gave a configuration for ({reason}): check the name, or give a folder"
        ) from None
    config = getattr(config, "vision_config", config)  # of CLIP, the image half
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"tower {name} is of type {config.model_type!r}; bigvivit knows {', '.join(FAMILIES)}: give one of those"
        )
    config.num_channels = 3  # a trained tower's folder says 3 per frame of its tubelets
    mean, std = read_normalisation(name, FAMILIES[config.model_type])
    return TowerSpec(name, config, mean, std)


def read_normalisation(name: str, family: Family) -> tuple[RGB, RGB]:
    """Mean and standard deviation from the model's preprocessor_config.json, or its family's where it has none."""
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return family.mean, family.std
    red, green, blue = values.get("image_mean", family.mean)
    red_std, green_std, blue_std = values.get("image_std", family.std)
    return (red, green, blue), (red_std, green_std, blue_std)


class Embed(nn.Module):
    """Pixels to the first layer's hidden states."""

    def __init__(self, spec: TowerSpec, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.mean, self.std, self.options = spec.mean, spec.std, spec.family.embed_options
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """uint8 [n, t * 3, h, w] → hidden [n, tokens, width] and what every layer needs beside it."""
        weight = next(self.parameters())
        pixels, dtype = pixels.to(weight.device, non_blocking=True), weight.dtype
        frames = pixels.shape[1] // 3
        # Built here from numbers, so that no buffer has to follow the module from device to device.
        mean, std = (torch.tensor(rgb * frames, device=pixels.device).view(-1, 1, 1) for rgb in (self.mean, self.std))
        first, *others = self.children()
        hidden = first(((pixels / 255 - mean) / std).to(dtype), **self.options)
        for part in others:
            hidden = part(hidden)
        return hidden, {"attention_mask": None}


class Pool(nn.Module):
    """The last layer's hidden states to one vector per image: the normalised CLS token."""

    def __init__(self, name: str, norm: nn.Module) -> None:
        super().__init__()
        self.add_module(name, norm)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, tokens, width] → [n, width]; the norm is per token, so the others need none."""
        (norm,) = self.children()
        return norm(hidden[:, 0])


class Tower(nn.Module):
    """A Hugging Face image tower in stages that can be fetched, cast and called one by one."""

    def __init__(self, spec: TowerSpec, embed: Embed, layers: nn.ModuleList, pool: Pool) -> None:
        super().__init__()
        self.spec = spec
        self.embed, self.layers, self.pool = embed, layers, pool

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [n, t * 3, h, w] → vectors [n, width]."""
        hidden, extras = self.embed(pixels)
        for layer in self.layers:
            hidden = layer(hidden, **extras)
        return self.pool(hidden)

    def pieces(self) -> list[tuple[str, nn.Module]]:
        """The units in which weights are loaded, cast and sharded: `embed`, `layers.0` …, `pool`."""
        layers = [(f"layers.{i}", layer) for i, layer in enumerate(self.layers)]
        return [("embed", self.embed), *layers, ("pool", self.pool)]


def build_tower(spec: TowerSpec, *, tubelet: int, image_size: int, droplayer: float) -> Tower:
    """The tower on the meta device. Raises ValueError where its patches do not tile `image_size`, in pixels."""
    patch = spec.config.patch_size
    if image_size % patch:
        below = image_size // patch * patch
        raise ValueError(
            f"clip.size={image_size} is not a multiple of the patch of tower {spec.name}, {patch} pixels; "
            f"try {' or '.join(str(size) for size in (below, below + patch) if size)}"
        )
    model = build_hf_model(spec, tubelet)
    family = spec.family
    embed = Embed(spec, {name: model.get_submodule(name) for name in family.embed})
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    apply_stochastic_depth(layers, droplayer)
    return Tower(spec, embed, layers, Pool(family.norm, model.get_submodule(family.norm)))


def build_hf_model(spec: TowerSpec, tubelet: int) -> PreTrainedModel:
    """Hugging Face's own model over tubelets, on the meta device, attending through SDPA."""
    settings = {**spec.config.to_dict(), "num_channels": 3 * tubelet}
    if isinstance(spec.config, Dinov2Config):
        settings |= {"use_mask_token": False, "drop_path_rate": 0.0}  # for pre-training; stochastic depth is ours
    config = type(spec.config).from_dict(settings, attn_implementation="sdpa")
    with torch.device("meta"):
        return spec.family.model(config, **spec.family.model_options)


def hf_name(spec: TowerSpec, piece: str, parameter: str) -> str:
    """A parameter's name in Hugging Face's model, from the piece it is in and its name there."""
    if piece.startswith("layers."):
        return f"{spec.family.layers}.{piece.removeprefix('layers.')}.{parameter}"
    return parameter
