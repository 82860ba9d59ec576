"""One Hugging Face image tower as embed → layers → pool.

A tower is built without weights, on the meta device; `model/weights.py` brings them.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AutoConfig, PretrainedConfig

from bigvivit.model.blocks import apply_stochastic_depth
from bigvivit.model.catalog import PUBLISHED, SIZES
from bigvivit.model.families import FAMILIES, HALF, RGB, Family, adapt_config, family_of
from bigvivit.model.hub import find_folder
from bigvivit.model.timm_towers import (
    MODEL_TYPE,
    PREFIX,
    build_timm_model,
    describe_architecture,
    is_timm,
    read_timm_config,
    take_apart,
    timm_name,
)

log = logging.getLogger(__name__)

DESCRIPTION = ["config.json", "preprocessor_config.json"]


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
        return family_of(self.config)

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
        ratio = getattr(self.config, "mlp_ratio", None)
        return int(self.config.intermediate_size if ratio is None else self.width * ratio)


def resolve_tower(name: str, *, random: bool = False) -> TowerSpec:
    """The tower of this name; reads its configuration, not its weights.

    `random` says that weights will be drawn, so that a published tower's dimensions are enough. Raises ValueError for a
    name that is neither a size, a folder nor an id the hub knows, and for a model that is no tower of FAMILIES.
    """
    if name in SIZES:
        return TowerSpec(name, SIZES[name], HALF, HALF)
    if name.startswith(PREFIX) and random:
        config = describe_architecture(name.removeprefix(PREFIX))
        return TowerSpec(name, config, tuple(config.pretrained_cfg["mean"]), tuple(config.pretrained_cfg["std"]))
    if name in PUBLISHED and random:
        config = adapt_config(PUBLISHED[name].config)
        family = family_of(config)
        return TowerSpec(name, config, family.mean, family.std)
    looks_local = Path(name).exists() or name.startswith(("/", "./", "../"))
    if looks_local and not (Path(name) / "config.json").is_file():
        raise ValueError(f"tower {name} is not a folder with a config.json: give a model in Hugging Face format")
    folder = find_folder(name, DESCRIPTION)
    if not (folder / "config.json").is_file():
        raise ValueError(f"tower {name} has no config.json: give a model in Hugging Face format")
    try:
        described = json.loads((folder / "config.json").read_text())
        timms = "architecture" in described and described.get("model_type", MODEL_TYPE) == MODEL_TYPE
        # Transformers would ask timm for the names of classes.
        config = read_timm_config(described) if timms else AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file leads to in there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the config.json of tower {name} cannot be read ({reason}): fetch it again, or give a model of type "
            f"{', '.join(FAMILIES)}"
        ) from None
    config = getattr(config, "vision_config", config)  # of CLIP, SigLIP and BLIP-2, the image half
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"tower {name} is of type {config.model_type!r}; bigvivit knows {', '.join(FAMILIES)}: give one of those"
        )
    config.num_channels = 3  # a trained tower's folder says 3 per frame of its tubelets
    config = adapt_config(config)
    mean, std = read_normalisation(folder, config)
    return TowerSpec(name, config, mean, std)


def read_normalisation(folder: Path, config: PretrainedConfig) -> tuple[RGB, RGB]:
    """Mean and standard deviation from the model's preprocessor_config.json, or its family's where it has none; timm
    writes them into config.json."""
    path, names, family = folder / "preprocessor_config.json", ("image_mean", "image_std"), family_of(config)
    fix = "fetch it again"
    try:
        if path.is_file():
            values = json.loads(path.read_text())
            fix += ", or delete it to take those of the family"
        elif is_timm(config):
            path, names, values = folder / "config.json", ("mean", "std"), config.pretrained_cfg
        else:
            return family.mean, family.std
        mean, std = (values.get(name, own) for name, own in zip(names, (family.mean, family.std), strict=True))
        if not all(len(rgb) == 3 and all(math.isfinite(value) for value in rgb) for rgb in (mean, std)) or 0 in std:
            raise ValueError(f"image_mean {mean}, image_std {std}")
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} gives no mean and deviation of three colours ({error}): {fix}") from None
    if family.preprocessor_is_wrong == tuple(mean) == tuple(std):
        log.info("tower %s: its preprocessor says %s, a default; it was trained with %s", folder, mean[0], family.mean)
        return family.mean, family.std
    return tuple(mean), tuple(std)


class Embed(nn.Module):
    """Pixels to the first layer's hidden states."""

    def __init__(self, spec: TowerSpec, parts: dict[str, nn.Module], rotary: nn.Module | None) -> None:
        super().__init__()
        self.mean, self.std, self.family = spec.mean, spec.std, spec.family
        # In a tuple, so that nothing casts its frequencies; in eval mode, since training would draw random positions.
        self.rotary = (rotary.eval(),) if rotary is not None else ()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """uint8 [n, t * 3, h, w] → hidden [n, tokens, width] and what every layer needs beside it.

        The second depends on the size of the images, not on which or how many they are.
        """
        weight = next(self.parameters())
        pixels, dtype = pixels.to(weight.device, non_blocking=True), weight.dtype
        frames = pixels.shape[1] // 3
        # Built here from numbers, so that no buffer has to follow the module from device to device.
        # Not made on the device, which would have to be waited for.
        mean, std = (
            torch.tensor(rgb * frames).view(-1, 1, 1).to(pixels.device, non_blocking=True)
            for rgb in (self.mean, self.std)
        )
        first, *others = self.children()
        hidden = first(((pixels / 255 - mean) / std).to(dtype), **self.family.embed_options)
        for part in others:
            hidden = part(hidden)
        extras = dict(self.family.layer_options)
        for rotary in self.rotary:
            tables = rotary(torch.empty(0, 3, *pixels.shape[-2:], dtype=dtype))
            if not isinstance(tables, dict):
                tables = {"position_embeddings": tables}
            extras |= tree_map(lambda table: table.to(pixels.device), tables)
        return hidden, extras


class Pool(nn.Module):
    """The last layer's hidden states to one vector per image, followed by its patches, averaged to `grid` x `grid`
    cells, where that is above 0."""

    def __init__(self, spec: TowerSpec, parts: dict[str, nn.Module], side: int, grid: int) -> None:
        """`side` is the number of patches along an edge of the image."""
        super().__init__()
        self.vector, self.side, self.grid = spec.family.vector, side, grid
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, tokens, width] → [n, width], or [n, (1 + grid²) * width]."""
        norm, *pooler = self.children()
        if self.vector == "CLS" and not self.grid:
            return norm(hidden[:, 0])  # the norm is per token, so the others need none
        hidden = norm(hidden)
        vectors = hidden[:, 0] if self.vector == "CLS" else pooler[0](hidden) if pooler else hidden.mean(1)
        if not self.grid:
            return vectors
        patches = hidden[:, -(self.side**2) :].transpose(1, 2).unflatten(2, (self.side, self.side))
        cells = F.adaptive_avg_pool2d(patches, self.grid).flatten(2).transpose(1, 2)
        return torch.cat([vectors, cells.flatten(1)], 1)


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


def build_tower(spec: TowerSpec, *, tubelet: int, image_size: int, droplayer: float, patch_grid: int = 0) -> Tower:
    """The tower on the meta device. Raises ValueError for an `image_size`, in pixels, that it cannot take, or that has
    fewer patches along an edge than `patch_grid`."""
    patch = spec.config.patch_size
    if image_size % patch:
        below = image_size // patch * patch
        raise ValueError(
            f"clip.size={image_size} is not a multiple of the patch of tower {spec.name}, {patch} pixels; "
            f"try {' or '.join(str(size) for size in (below, below + patch) if size)}"
        )
    family = spec.family
    if not family.resizes and image_size != spec.config.image_size:
        raise ValueError(
            f"clip.size={image_size}: tower {spec.name} has positions for images of {spec.config.image_size} pixels, "
            f"and its family has no way of interpolating them; give --clip.size {spec.config.image_size}"
        )
    side = image_size // patch
    if patch_grid > side:
        raise ValueError(
            f"model.patch_grid={patch_grid}: an image of {image_size} pixels has {side} patches along an edge; give at "
            f"most that, or larger images"
        )
    model = build_hf_model(spec, tubelet)
    embed, layers, ends, rotary = take_apart(model) if is_timm(spec.config) else take_hf_apart(model, spec)
    apply_stochastic_depth(layers, droplayer)
    return Tower(spec, Embed(spec, embed, rotary), layers, Pool(spec, ends, side, patch_grid))


def take_hf_apart(
    model: nn.Module, spec: TowerSpec
) -> tuple[dict[str, nn.Module], nn.ModuleList, dict[str, nn.Module], nn.Module | None]:
    """(embed, layers, ends, rotary) of Hugging Face's model."""
    family, rotary = spec.family, None
    if family.rotary is not None:
        with torch.device("cpu"):  # its frequencies are numbers, not weights
            rotary = type(model.get_submodule(family.rotary))(spec.config)
    embed = {name: model.get_submodule(name) for name in family.embed}
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    ends = {name: model.get_submodule(name) for name in (family.norm, family.pooler) if name is not None}
    return embed, layers, ends, rotary


def build_hf_model(spec: TowerSpec, tubelet: int) -> Any:
    """Hugging Face's own model over tubelets, or timm's, on the meta device, attending through SDPA."""
    if is_timm(spec.config):
        with torch.device("meta"):
            return build_timm_model(spec.config, tubelet)
    settings = {**spec.config.to_dict(), **spec.family.settings, "num_channels": 3 * tubelet}
    config = type(spec.config).from_dict(settings, attn_implementation="sdpa")
    with torch.device("meta"):
        model = spec.family.model(config, **spec.family.model_options)
        for part in list(model.modules()):
            if getattr(part, "mask_token", None) is not None:
                part.mask_token = None  # for pre-training; without a use it would get no gradient
            for name, inner in part.named_children():
                if isinstance(inner, nn.Conv2d) and inner.in_channels != 3 * tubelet:  # BLIP-2 knows only images
                    patch = spec.config.patch_size
                    wider = nn.Conv2d(3 * tubelet, inner.out_channels, kernel_size=patch, stride=patch)
                    setattr(part, name, wider)
    return model


def hf_name(spec: TowerSpec, piece: str, parameter: str) -> str:
    """A parameter's name in Hugging Face's model, or in timm's, from the piece it is in and its name there."""
    if is_timm(spec.config):
        return timm_name(piece, parameter)
    if piece.startswith("layers."):
        return f"{spec.family.layers}.{piece.removeprefix('layers.')}.{parameter}"
    return parameter
