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
OURS = {"num_classes", "in_chans", "dynamic_img_size", "drop_path_rate"}
"""Arguments of timm's models that towers set themselves."""
KNOWN = "timm's Eva and VisionTransformer, such as timm/eva_giant_patch14_224 or timm/vit_base_r50_s16_224"


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

    arguments = {key: value for key, value in (config.model_args or {}).items() if key not in OURS}
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(config.architecture, num_classes=0, dynamic_img_size=True, **arguments)
    except Exception as error:  # whatever a wrong name or wrong arguments lead to in there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model.tower={name} is no tower of timm's ({reason}): give one of {KNOWN}") from None
    if unfit := why_unfit(model):
        raise ValueError(f"model.tower={name} is {unfit}; bigvivit knows {KNOWN}")
    mlp, patches = model.blocks[0].mlp, model.patch_embed
    known = {
        "model_args": arguments,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "intermediate_size": (mlp.fc1_g if hasattr(mlp, "fc1_g") else mlp.fc1).out_features,
        "patch_size": patches.feat_ratio(as_scalar=True),
        "image_size": patches.img_size[0],
        "hybrid": hasattr(patches, "backbone"),
        "pooling": {"token": "CLS", "avg": "mean"}.get(model.global_pool, model.global_pool),
        "pretrained_cfg": {**model.pretrained_cfg, **getattr(config, "pretrained_cfg", {})},
    }
    for key, value in known.items():
        setattr(config, key, value)
    return config


def why_unfit(model: Any) -> str | None:
    """Why timm's model cannot be taken apart as towers are; None where it can."""
    from timm.models import Eva, VisionTransformer

    if type(model) not in (Eva, VisionTransformer):  # what is derived from them may have heads and tokens of its own
        return f"a {type(model).__name__}"
    if model.attn_pool is not None or not model.global_pool:
        return "one that pools by attention, or not at all"
    if not hasattr(model.blocks[0], "drop_path1"):
        return f"one of {type(model.blocks[0]).__name__}s, which have no attention and MLP one after the other"
    if getattr(model, "rope_mixed", False) or len({layer_shapes(block) for block in model.blocks}) > 1:
        return "one whose layers differ"
    if len(model.state_dict()) > len(list(model.parameters())):
        return "one with running statistics"
    return None


def layer_shapes(layer: nn.Module) -> tuple[torch.Size, ...]:
    """What tells layers apart that are of one class."""
    return tuple(parameter.shape for parameter in layer.parameters())


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
    arguments = {**config.model_args, "in_chans": 3 * tubelet}
    model: Any = timm.create_model(config.architecture, num_classes=0, dynamic_img_size=True, **arguments)
    model.blocks = model.blocks[: config.num_hidden_layers]  # a forecast traces fewer
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
        self.how, self.fc_norm = model.global_pool, model.fc_norm
        self.prefix, self.with_prefix = model.num_prefix_tokens, getattr(model, "pool_include_prefix", False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, tokens, width] → [n, width]."""
        from timm.layers import global_pool_nlc

        pooled: Tensor = global_pool_nlc(hidden, self.how, self.prefix, reduce_include_prefix=self.with_prefix)
        return self.fc_norm(pooled)


def take_apart(model: Any) -> tuple[dict[str, nn.Module], nn.ModuleList, dict[str, nn.Module], nn.Module | None]:
    """(embed, layers, ends, rotary) of timm's model, which is of no other use then."""
    rotary = None
    if getattr(model, "rope", None) is not None:
        rope = model.rope.to_empty(device="cpu")
        rope.init_non_persistent_buffers()  # its frequencies: numbers, not weights
        rotary = Rotary(rope, model.config.patch_size)
        model.rope = None
    ends = {"norm": model.norm, "pooler": PoolTokens(model)}
    layers = nn.ModuleList(model.blocks)
    model.blocks, model.norm, model.fc_norm = nn.ModuleList(), nn.Identity(), nn.Identity()
    return {"stem": Stem(model)}, layers, ends, rotary


def timm_name(piece: str, parameter: str) -> str:
    """A parameter's name in timm's model, from the piece it is in and its name there."""
    if piece.startswith("layers."):
        return f"blocks.{piece.removeprefix('layers.')}.{parameter}"
    return parameter.removeprefix("stem.timm.").removeprefix("pooler.")
