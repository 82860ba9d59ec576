"""`bigvivit towers`: the towers that are known by name, with what each costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bigvivit.model.catalog import PUBLISHED, SIZES, TIMM
from bigvivit.model.families import HALF, IMAGENET_MEAN
from bigvivit.model.timm_towers import has_timm
from bigvivit.model.towers import build_tower, resolve_tower

BF16_BYTES = 2


@dataclass(frozen=True)
class Row:
    """One tower."""

    name: str
    family: str
    dimensions: str
    """Layers/width/heads/width of the MLP."""
    patch: int
    image: int
    """Side of the images it was trained on, in pixels."""
    vector: str
    """What stands for a frame."""
    normalisation: str
    fp16: str
    parameters: int
    bf16_bytes: int
    tokens: int
    """Per frame, of images of its own size."""
    source: str
    """Where the dimensions come from."""


def list_towers() -> list[Row]:
    """Every tower that has a name here, built without weights; those from timm where it is installed."""
    return [describe(name) for name in (*SIZES, *PUBLISHED, *(TIMM if has_timm() else ()))]


def describe(name: str) -> Row:
    """One of them; parameters and tokens are counted on the tower itself, of single frames."""
    spec = resolve_tower(name, random=True)
    family, image = spec.family, int(spec.config.image_size)
    tower = build_tower(spec, tubelet=1, image_size=image, droplayer=0.0)
    hidden, _ = tower.embed(torch.empty(1, 3, image, image, dtype=torch.uint8, device="meta"))
    parameters = count(tower)
    return Row(
        name=name,
        family=getattr(spec.config, "trained_as", spec.config.model_type),
        dimensions=f"{len(tower.layers)}/{spec.width}/{spec.heads}/{spec.mlp}",
        patch=int(spec.config.patch_size),
        image=image,
        vector=getattr(spec.config, "pooling", family.vector),
        normalisation={HALF: "0.5", IMAGENET_MEAN: "ImageNet"}.get(spec.mean, "OpenAI"),
        fp16={True: "yes", False: "no", None: "?"}[family.fp16_safe],
        parameters=parameters,
        bf16_bytes=parameters * BF16_BYTES,
        tokens=hidden.shape[1],
        source=find_source(name),
    )


def find_source(name: str) -> str:
    """Where a tower's dimensions come from."""
    if name in PUBLISHED:
        return PUBLISHED[name].source
    if name in TIMM:
        return "timm's registry"
    return "ours" if name == "vit-demo" else "the paper, Table 5"


def count(module: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
