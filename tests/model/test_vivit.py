"""The factorised encoder as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bigvivit.model.adapter import Adapter
from bigvivit.model.temporal import STILL, TemporalInput, TemporalTransformer
from bigvivit.model.towers import build_tower
from bigvivit.model.vivit import ViViT, build_vivit
from bigvivit.model.weights import random_weights
from tests.model.reference import DEMO


def build(*, adapter: bool, seed: int = 0, form: TemporalInput = "centred", patch_grid: int = 0) -> ViViT:
    tower = build_tower(DEMO, tubelet=2, image_size=48, droplayer=0.0, patch_grid=patch_grid)
    model = build_vivit(
        tower,
        frames=8,
        tubelet=2,
        classes=5,
        temporal_depth=2,
        droplayer=0.0,
        temporal_input=form,
        adapter=adapter,
        patch_grid=patch_grid,
        seed=seed,
    )
    fill = random_weights(DEMO, seed)
    for name, piece in tower.pieces():
        piece.to_empty(device="cpu")
        fill(name, piece)
    return model


@pytest.mark.parametrize("form", ["centred", "original"])
def test_with_patches_training_begins_where_it_would_without(form: TemporalInput) -> None:
    """And every cell matters as soon as the last matrix is not zero any more."""
    plain, pooled = build(adapter=True, form=form), build(adapter=True, form=form, patch_grid=2)
    for model in (plain, pooled):
        nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pooled(CLIPS), plain(CLIPS))
    assert pooled.pooling is not None
    nn.init.normal_(pooled.pooling.out.weight)
    vectors = pooled.tower(CLIPS.view(8, 6, 48, 48)).view(2, 4, -1)
    torch.testing.assert_close(pooled(vectors), pooled(CLIPS))
    own, cells = vectors[..., :128], vectors[..., 128:].unflatten(-1, (4, 128))
    for cell in range(4):
        changed = cells.clone()
        changed[:, :, cell] = -changed[:, :, cell]
        changed = torch.cat([own, changed.flatten(-2)], -1)
        assert not torch.allclose(pooled(changed), pooled(CLIPS), atol=1e-2)


CLIPS = torch.randint(256, (2, 8, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_logits_start_at_zero() -> None:
    assert not build(adapter=True)(CLIPS).any()


@pytest.mark.parametrize("form", ["centred", "original"])
def test_the_tower_sees_each_tubelet_by_itself(form: TemporalInput) -> None:
    model = build(adapter=False, form=form)
    nn.init.normal_(model.head.weight)
    vectors = torch.stack([model.tower(CLIPS[:, i : i + 2].flatten(1, 2)) for i in range(0, 8, 2)], dim=1)
    if form == "centred":
        vectors = (vectors - vectors.mean(-1, keepdim=True)) / (
            vectors.var(-1, keepdim=True, correction=0) + 1e-5
        ).sqrt()
    expected = model.head(model.temporal(vectors))
    torch.testing.assert_close(model(CLIPS), expected)


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_order_is_told_from_the_start_at_any_size_of_vectors(size: float) -> None:
    """Reversing a clip changes what leaves the temporal transformer about as much as another clip does."""
    vectors = size * (torch.randn(8, 1, 128) + 0.3 * torch.randn(8, 16, 128))  # a clip's frames are much alike
    change = {}
    for form in ("centred", "original"):
        torch.manual_seed(0)
        temporal = build_temporal(form, tubelets=16)
        with torch.no_grad():
            normalised = nn.functional.layer_norm(vectors, (128,)) if form == "centred" else vectors
            outputs, reversed_ = temporal(normalised), temporal(normalised.flip(1))
        change[form] = float((outputs - reversed_).norm() / (outputs - outputs.roll(1, 0)).norm())
    assert change["centred"] > 0.3
    assert size < 1 or change["original"] < 0.05


def build_temporal(form: TemporalInput, tubelets: int) -> TemporalTransformer:
    model = build_vivit(
        build_tower(DEMO, tubelet=2, image_size=48, droplayer=0.0),
        frames=2 * tubelets,
        tubelet=2,
        classes=5,
        temporal_depth=2,
        droplayer=0.0,
        temporal_input=form,
        adapter=False,
        seed=0,
    )
    return model.temporal


def test_what_a_clip_has_in_common_reaches_the_cls_token_through_its_gate() -> None:
    temporal = build_temporal("centred", tubelets=4)
    vectors, common = torch.randn(2, 4, 128), torch.randn(2, 1, 128)
    with torch.no_grad():
        torch.testing.assert_close(temporal(vectors + common), temporal(vectors))  # the gate starts closed
        temporal.mean_gate.fill_(1.0)
        assert (temporal(vectors + common) - temporal(vectors)).abs().mean() > 0.1


def test_a_clip_in_which_nothing_moves_stays_still() -> None:
    temporal = build_temporal("centred", tubelets=4)
    still = torch.randn(1, 1, 128).expand(1, 4, 128)
    with torch.no_grad():
        nearly = temporal(still + STILL / 100 * torch.randn(1, 4, 128))
        torch.testing.assert_close(nearly, temporal(still), atol=0.05, rtol=0.0)


def test_the_adapter_starts_as_the_identity_and_learns() -> None:
    adapter = build(adapter=True).adapter
    assert isinstance(adapter, Adapter)
    vectors = torch.randn(2, 4, 128)
    assert torch.equal(adapter(vectors), vectors)
    adapter(vectors).square().sum().backward()
    assert adapter.fc2.weight.grad is not None
    assert adapter.fc2.weight.grad.any()


@pytest.mark.parametrize("form", ["centred", "original"])
def test_the_temporal_transformer_against_torchs_own(form: TemporalInput) -> None:
    """The same weights in torch.nn.TransformerEncoderLayer, written independently of Hugging Face."""
    torch.manual_seed(0)
    ours = TemporalTransformer(tubelets=6, width=16, heads=4, mlp=32, depth=2, droplayer=0.0, form=form)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = []
    for layer in ours.layers:
        block = nn.TransformerEncoderLayer(
            16, 4, 32, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        attention, mlp = layer.attention, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        state = {
            "self_attn.in_proj_weight": torch.cat([part.weight for part in qkv]),
            "self_attn.in_proj_bias": torch.cat([part.bias for part in qkv]),
            "self_attn.out_proj": attention.o_proj,
            "linear1": mlp.fc1,
            "linear2": mlp.fc2,
            "norm1": layer.layernorm_before,
            "norm2": layer.layernorm_after,
        }
        flat = {}
        for name, value in state.items():
            if isinstance(value, nn.Module):
                flat |= {f"{name}.{key}": parameter for key, parameter in value.named_parameters()}
            else:
                flat[name] = value
        block.load_state_dict(flat)
        theirs.append(block)
    vectors = torch.randn(3, 6, 16)
    cls, tokens = ours.cls_token.expand(3, -1, -1), vectors
    if ours.mean_gate is not None:
        mean = vectors.mean(1, keepdim=True)
        cls = cls + ours.mean_gate * mean
        power = ((vectors - mean) ** 2).flatten(1).mean(1)[:, None, None]
        tokens = (vectors - mean) / (power + STILL**2).sqrt()
    hidden = torch.cat([cls, tokens], dim=1) + ours.position_embeddings
    for block in theirs:
        hidden = block(hidden)
    torch.testing.assert_close(ours(vectors), ours.layernorm(hidden)[:, 0])


def test_small_parts_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    first = build(adapter=True, seed=4)
    torch.manual_seed(2)
    second, other = build(adapter=True, seed=4), build(adapter=True, seed=5)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.temporal.position_embeddings, other.temporal.position_embeddings)


@pytest.mark.parametrize("adapter", [False, True])
def test_every_parameter_is_reached_by_the_loss(adapter: bool) -> None:
    model = build(adapter=adapter)
    nn.init.normal_(model.head.weight)
    if model.adapter is not None:
        nn.init.normal_(model.adapter.fc2.weight)
    model(CLIPS).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
