"""Image towers from timm: EVA, plain vision transformers, and hybrids that begin with a ResNet.

timm is an extra (`pip install "bigvivit[timm]"`), imported only where such a tower is asked for. The modules are timm's
own; transformers' configuration for them (TimmWrapperConfig) describes them, so a trained tower's folder opens there.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, TimmWrapperConfig

PREFIX = "timm/"
MODEL_TYPE = TimmWrapperConfig.model_type
OURS = {"num_classes", "in_chans", "depth", "dynamic_img_size"}
"""Arguments of timm's models that towers set themselves."""
FAMILIES_HELP = "timm's Eva and VisionTransformer, such as timm/eva_giant_patch14_224 or timm/vit_base_r50_s16_224"


def has_timm() -> bool:
    """Whether timm is installed."""
    return importlib.util.find_spec("timm") is not None


def is_timm(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a model in timm."""
    return bool(config.model_type == MODEL_TYPE)


def describe_architecture(name: str) -> PretrainedConfig:
    """The configuration of an architecture that timm knows by this name. Raises ValueError; see `complete`."""
    return complete(TimmWrapperConfig(architecture=name, model_args={}))


def read_timm_config(described: dict[str, Any]) -> PretrainedConfig:
    """The configuration in a config.json of timm's, or in one that transformers wrote of such a model."""
    names = ("architecture", "model_args", "pretrained_cfg")
    return TimmWrapperConfig(**{name: described[name] for name in names if described.get(name) is not None})


def complete(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with its dimensions under the names that others have, read off the model itself.

    Raises ValueError where timm is not installed, and for a model that is no transformer over patches as ours are.
    """
    name = PREFIX + config.architecture
    if not has_timm():
        raise ValueError(f'model.tower={name} needs timm: pip install "bigvivit[timm]"')
    import timm
    from timm.models import Eva, VisionTransformer

    arguments = {key: value for key, value in (config.model_args or {}).items() if key not in OURS}
    try:
        with torch.device("meta"):
            model = timm.create_model(config.architecture, num_classes=0, dynamic_img_size=True, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model.tower={name} is no tower of timm's ({reason}): give one of {FAMILIES_HELP}") from None
    parts: Any = model
    unfit = ""
    if not isinstance(model, Eva | VisionTransformer):
        unfit = f"a {type(model).__name__}"
    elif getattr(model, "attn_pool", None) is not None or getattr(model, "rope_mixed", False):
        unfit = "one that pools by attention, or whose layers differ in their positions"
    if unfit:
        raise ValueError(f"model.tower={name} is {unfit}; bigvivit knows {FAMILIES_HELP}")
    published = {**parts.pretrained_cfg, **getattr(config, "pretrained_cfg", {})}
    block, patches = parts.blocks[0], parts.patch_embed
    known = {
        "model_args": arguments,
        "hidden_size": parts.embed_dim,
        "num_hidden_layers": (config.model_args or {}).get("depth", len(parts.blocks)),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": (block.mlp.fc1_g if hasattr(block.mlp, "fc1_g") else block.mlp.fc1).out_features,
        "patch_size": patches.feat_ratio(as_scalar=True),
        "image_size": patches.img_size[0],
        "hybrid": hasattr(patches, "backbone"),
        "normalisation": [[float(value) for value in published[key]] for key in ("mean", "std")],
    }
    for key, value in known.items():
        setattr(config, key, value)
    return config


def build_timm_model(config: PretrainedConfig, tubelet: int) -> nn.Module:
    """timm's own model over tubelets, its `config` beside it. Raises ValueError for a hybrid over more than one frame.

    A ResNet's first kernel has no central frame to be initialised by: its weights are standardised over their inputs.
    """
    import timm

    if config.hybrid and tubelet > 1:
        raise ValueError(
            f"model.tubelet={tubelet}: {config.architecture} begins with a ResNet, which takes single frames; "
            f"give --model.tubelet 1"
        )
    arguments = {**config.model_args, "in_chans": 3 * tubelet, "depth": config.num_hidden_layers}
    model: nn.Module = timm.create_model(config.architecture, num_classes=0, dynamic_img_size=True, **arguments)
    own: Any = type(config)(**{**config.to_dict(), "model_args": arguments})
    model.config = own
    return model


class Stem(nn.Module):
    """Pixels to the first layer's hidden states: the model without its layers and what follows them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.timm = model

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, t * 3, h, w] → [n, tokens, width]."""
        model: Any = self.timm
        hidden = model._pos_embed(model.patch_embed(pixels))
        return model.norm_pre(hidden[0] if isinstance(hidden, tuple) else hidden)  # EVA's also gives its positions


class Rotary(nn.Module):
    """Rotary positions for an image's size, the same for every layer."""

    def __init__(self, rope: nn.Module, patch: int) -> None:
        super().__init__()
        self.rope, self.patch = rope, patch

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """What every layer is called with, for pixels [..., h, w]."""
        rope: Any = self.rope
        return {"rope": rope.get_embed(shape=[size // self.patch for size in pixels.shape[-2:]])}


class PoolTokens(nn.Module):
    """The last hidden states to one vector per image, as timm's head gets it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.how, self.prefix, self.fc_norm = model.global_pool, model.num_prefix_tokens, model.fc_norm

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, tokens, width] → [n, width]."""
        from timm.layers import global_pool_nlc

        pooled: Tensor = self.fc_norm(global_pool_nlc(hidden, pool_type=self.how, num_prefix_tokens=self.prefix))
        return pooled


def take_apart(model: Any) -> tuple[dict[str, nn.Module], nn.ModuleList, dict[str, nn.Module], Rotary | None]:
    """(embed, layers, pool, rotary) of timm's model, which is of no other use then."""
    rotary = None
    if getattr(model, "rope", None) is not None:
        rotary = Rotary(build_rope(model.config), model.config.patch_size)
        model.rope = None
    ends: dict[str, nn.Module] = {"norm": model.norm, "pooler": PoolTokens(model)}
    layers: nn.ModuleList = model.blocks
    model.blocks, model.norm, model.fc_norm = nn.ModuleList(), nn.Identity(), nn.Identity()
    return {"stem": Stem(model)}, layers, ends, rotary


def build_rope(config: PretrainedConfig) -> nn.Module:
    """timm's rotary positions, on the CPU with their values: those of a model without layers."""
    import timm

    arguments = {**config.model_args, "depth": 0}
    with torch.device("cpu"):
        model: Any = timm.create_model(config.architecture, num_classes=0, dynamic_img_size=True, **arguments)
    rope: nn.Module = model.rope
    return rope


def timm_name(piece: str, parameter: str) -> str:
    """A parameter's name in timm's model, from the piece it is in and its name there."""
    if piece.startswith("layers."):
        return f"blocks.{piece.removeprefix('layers.')}.{parameter}"
    return parameter.removeprefix("stem.timm.").removeprefix("pooler.")
